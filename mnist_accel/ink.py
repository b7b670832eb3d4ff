"""Tell the ink of one digit from paper, shadows, ruled lines, frames, specks and the neighbours' strokes."""

from collections.abc import Sequence

import cv2
import numpy as np

from mnist_accel.paper import find_ink, inked, is_dark_ink, otsu_level
from mnist_accel.parts import (
    Grey,
    Mask,
    Parts,
    box_of,
    distance_to_paper,
    grown,
    longest_side,
    stroke_width,
    without_holes,
)

# A rotated rectangle as OpenCV has it: its middle and its size, x and y in pixels, and its angle in degrees.
Sheet = tuple[Sequence[float], Sequence[float], float]

# The pen's width as a share of the digit's longest side: three of four MNIST digits are written with a wider one.
MIN_PEN = 0.09


def find_digit(grey: Grey, tight: bool, tiny: bool) -> Grey | None:
    """The strength of a digit's ink in an image of either polarity: 0 off the digit; None where there is no ink.

    Args:
        grey: (H, W) float32 in 0..1, 96 to 224 pixels on its longest side: ink is judged at the scale of whole strokes.
        tight: the image is so small or so narrow that it must be a crop of the digit alone. Then its ink may touch
            every edge, and a bar along an edge is a 7's or a 2's, not a frame's.
        tiny: it was so small before it was enlarged that even a stroke's edge fades slowly.

    Returns:
        (H, W) float32 in 0..1, with a margin on all sides where a thin stroke was made wider; ink is what is over 0.5.
    """
    # Noise below a hundredth of the image is no stroke.
    smooth = cv2.GaussianBlur(grey, (0, 0), max(0.5, max(grey.shape) / 256))
    if not is_dark_ink(smooth, tight):
        smooth = 1 - smooth
    mask, strength, noise = find_ink(smooth, tight)
    if not tight and not mask.any():
        # Where a sheet of paper fills most of the image, its desk can pass for the paper and the sheet for noise.
        smooth = 1 - smooth
        mask, strength, noise = find_ink(smooth, tight)
    if not tight:
        mask, strength = _filled(mask, strength, smooth)
        foreign = _foreign_parts(mask)
        if foreign.any():
            # A printed frame can be many times darker than a pencil's digit: look again without it and its blur.
            rest = strength * (1 - (grown(foreign, 5) & ~(mask & ~foreign)))
            digit = _of_one_pen(_digit_parts(inked(rest, noise), rest), rest)
            # A zero that fills the image lies along its edges as a frame does, and nothing as large as a digit is left.
            if longest_side(digit) > 0.12 * max(digit.shape) and not _is_shading(strength, digit):
                return _sharpened(rest, digit)
    digit = _of_one_pen(_digit_parts(mask, strength), strength)
    found = digit.any() and (tiny or not _is_shading(strength, digit))
    return _sharpened(strength, digit) if found else None


def _filled(mask: Mask, strength: Grey, smooth: Grey) -> tuple[Mask, Grey]:
    """Mask and strength, with the inside of a shape too broad for `_paper` to see past, found as its outline only."""
    inside = without_holes(mask)
    around = grown(inside, 11) & ~grown(inside, 5)
    holes = Parts(inside & ~mask)
    if holes.count < 2 or not around.any() or holes.size[holes.largest()].min() <= 0.1 * max(mask.shape):
        return mask, strength
    hole = holes.mask(holes.largest())
    outline, enclosed, paper = (float(np.median(smooth[part > 0])) for part in (mask, hole, around))
    if abs(enclosed - outline) < 0.2 * abs(paper - outline):
        filled = mask | hole  # a filled square would read as a zero otherwise
    elif abs(outline - paper) < 0.2 * abs(enclosed - outline):
        filled = hole  # a bright shape where dark ink was assumed: its outline is a halo, as dark as all around it
    else:
        return mask, strength
    return filled, np.where(hole > 0, strength[mask > 0].max(), strength * filled)


def _is_shading(strength: Grey, part: Mask) -> bool:
    """Whether what was found fades slowly into its surroundings, as uneven light does: a pen's stroke ends."""
    # Out of focus a stroke fades as slowly, but the deep shadows come from outside the image.
    if strength[part > 0].mean() > 0.2 and not Parts(part).at_edge().any():
        return False
    # Measured a fortieth of the image off it, beyond a bad lens's blur: there, ink leaves less than a sixth of itself
    # along most of its outline.
    side = max(part.shape)
    distance = cv2.distanceTransform(1 - part, cv2.DIST_L2, 3)
    around = strength[(distance > side / 60) & (distance <= side / 25)]
    return bool(around.size and np.median(around) > strength[part > 0].mean() / 6)


def sheet_of_paper(found: Mask) -> Sheet | None:
    """The sheet with strokes on it, lying on something of another brightness, that was found instead of a digit.

    That is a rectangle, seen a little aslant perhaps, with holes much narrower than what is left of it beside them: the
    counters of a bold zero or eight are not. None where nothing of the kind was found.
    """
    outlines = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    outline = max(outlines, key=cv2.contourArea)
    hull = cv2.convexHull(outline)
    corners = cv2.approxPolyDP(hull, 0.04 * cv2.arcLength(hull, True), True)
    middle, size, degrees = cv2.minAreaRect(outline)
    area = cv2.contourArea(outline)
    if len(corners) != 4 or min(size) < 0.1 * max(found.shape) or area < 0.8 * size[0] * size[1]:
        return None
    sheet = cv2.drawContours(np.zeros_like(found), [outline], -1, 1, cv2.FILLED)
    strokes = sheet & ~found
    holes = Parts(strokes)
    if holes.count < 2 or holes.size[1:].max() < 0.1 * min(size):
        return None
    blank, stroke = (float(distance_to_paper(part).max()) for part in (sheet & found, strokes))
    return (middle, size, degrees) if blank > 0.1 * min(size) and stroke < 0.6 * blank else None


# --- lines and frames ------------------------------------------------------------------------------------------------


def _foreign_parts(mask: Mask) -> Mask:
    """What is no part of the digit: frames, the lines of tables and of ruled paper, what reaches in from outside."""
    lines = _crossing_lines(mask)
    height, width = mask.shape
    parts = Parts(mask & ~lines)
    border = np.ones_like(mask)
    depth_y, depth_x = round(0.15 * height), round(0.15 * width)
    border[depth_y : height - depth_y, depth_x : width - depth_x] = 0
    foreign = parts.at_edge() & (parts.sums(border) / parts.area > 0.85)
    for part in 1 + np.flatnonzero((parts.size[1:] > (0.2 * width, 0.2 * height)).all(1)):
        shape = parts.mask(part)
        large = (parts.size[part] > (0.5 * width, 0.5 * height)).all()
        foreign[part] |= (large and _is_frame(shape[box_of(shape)])) or _is_drawn_around(shape, parts)
    # What lies around a corner of the image is the desk beside a sheet, where a digit stands free.
    around = np.zeros(parts.count, bool)
    around[parts.labels[[0, 0, -1, -1], [0, -1, 0, -1]]] = True
    others = np.where(around | foreign, 0, parts.area)
    others[0] = around[0] = 0
    largest = int(others.argmax())
    if others.any() and not parts.at_edge()[largest] and parts.size[largest].max() > 0.12 * max(mask.shape):
        foreign |= around
    return lines | foreign.astype(np.uint8)[parts.labels]


def _is_frame(shape: Mask) -> bool:
    """Whether a shape follows its bounding box on all four sides, corners included, and leaves the middle free."""
    height, width = shape.shape
    y, x = max(2, round(0.12 * height)), max(2, round(0.12 * width))
    sides = shape[:y].any(0), shape[-y:].any(0), shape[:, :x].any(1), shape[:, -x:].any(1)
    return min(side.mean() for side in sides) > 0.9 and not shape[2 * y : -2 * y, 2 * x : -2 * x].any()


def _is_drawn_around(shape: Mask, parts: Parts) -> bool:
    """Whether a thin ring or box, about as wide as high, has a part inside that is a good deal of its height."""
    height, width = shape[box_of(shape)].shape
    if not 0.75 < width / height < 1.33:
        return False
    filled = without_holes(shape)
    holes = Parts(filled & ~shape)
    if holes.count < 2:
        return False
    hole = holes.mask(holes.largest())
    inside = hole & (parts.labels > 0)
    return hole.sum() > 0.6 * filled.sum() and inside[box_of(inside)].shape[0] > 0.28 * height


def _crossing_lines(mask: Mask) -> Mask:
    """Straight lines that run through the whole image, and are no strokes of the digit."""
    lines = _level_lines(mask) + [line.T for line in _level_lines(mask.T.copy())]
    result = np.zeros_like(mask)
    if not lines:
        return result
    rest = Parts(mask & ~np.bitwise_or.reduce(lines))
    if rest.count < 2:
        return result
    # A 7's bar, or a 4's stem, in a close crop, is told from a line by what is left: without the line, the digit stands
    # free of the image's edges; without the bar, the 7's stem still reaches one. A line through the middle must also be
    # thinner than the pen.
    height, width = mask.shape
    digit, free = rest.mask(rest.largest()), not rest.at_edge()[rest.largest()]
    near, pen = grown(digit, 3), stroke_width(digit)
    for line in lines:
        rows, columns = box_of(line)
        at_border = min(rows.stop, columns.stop) - 1 < 0.2 * max(height, width)
        at_border |= max(rows.start / height, columns.start / width) > 0.8
        if not (near & line).any() or (free and (at_border or stroke_width(line) < 0.6 * pen)):
            result |= line
    if not result.any():
        return result
    # Where two lines cross, the dot that each of them takes for a stroke of the other is left.
    left = Parts(mask & ~result)
    touching = np.zeros(left.count, bool)
    touching[left.labels[grown(result, 3) > 0]] = True
    dots = touching & (left.size.max(1) <= 2.5 * stroke_width(result) + 2)
    dots[0] = False
    return result | dots.astype(np.uint8)[left.labels]


def _level_lines(mask: Mask) -> list[Mask]:
    """The pixels of each line within about 5 degrees of level that runs from the left edge to the right."""
    height, width = mask.shape
    # A slanting line is a staircase of runs; thickened a little, runs of a quarter of the width hold together.
    thick = cv2.dilate(mask, np.ones((round(0.02 * height) | 1, 1), np.uint8))
    runs = Parts(cv2.morphologyEx(thick, cv2.MORPH_OPEN, np.ones((1, max(3, width // 4)), np.uint8)) & mask)
    lines = []
    for run in range(1, runs.count):
        (wide, high), area = runs.size[run], runs.area[run]
        if wide >= 0.98 * width and high <= 0.25 * height and area <= 0.12 * height * wide:
            # Strokes that cross the line are taller than it is thick: they stay whole.
            tall: Mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((int(1.7 * area / wide) + 3, 1), np.uint8))
            lines.append(runs.mask(run) & ~tall)
    return [line for line in lines if line.any()]


# --- the digit -------------------------------------------------------------------------------------------------------


def _digit_parts(mask: Mask, strength: Grey) -> Mask:
    """The part of the mask with most ink nearest to the middle, and the parts that belong to it."""
    parts = Parts(mask)
    if parts.count < 2:
        return mask
    at_edge, area, mass = parts.at_edge(), parts.area, parts.sums(strength)
    off_centre = np.hypot(*(parts.middle / mask.shape[::-1] - 0.5).T)
    # A line drawn under the digit can have more ink than the digit.
    flat = parts.size[:, 0] > 4 * parts.size[:, 1]
    score = mass * (1 - 0.8 * off_centre) * np.where(at_edge, 0.5, 1.0) * np.where(flat, 0.3, 1.0)
    score[0] = -1
    kept = score == score.max()
    main_at_edge = at_edge[kept].any()
    while True:
        # More than specks, and close to what is kept.
        start, end = parts.start[kept].min(0), parts.end[kept].max(0)
        gap = np.maximum(start - parts.end, parts.start - end).max(1)
        close = (area > 0.03 * area[kept].sum()) & (gap <= 0.25 * (end - start).max())
        # What reaches the image's edge while the main part does not is a neighbour's.
        overlaps = (gap <= 0) & ((parts.middle > start) & (parts.middle < end)).all(1)
        underline = flat & (parts.start[:, 1] > end[1] + 0.05 * (end - start).max())
        own = close & (main_at_edge | ~at_edge | overlaps) & ~underline
        # A second digit, whole and about as large: there is no telling which is meant, and both are to be seen.
        tall = parts.size[:, 1] / (end - start)[1]
        second = ~at_edge & (tall > 0.6) & (tall < 1.6)
        second &= (mass > 0.3 * mass[kept].max()) & (area > 0.3 * area[kept].max())
        more = (own | second) & ~kept
        more[0] = False
        if not more.any():
            return kept.astype(np.uint8)[parts.labels]
        kept |= more


def _of_one_pen(digit: Mask, strength: Grey) -> Mask:
    """The digit without what is far fainter than the rest of it: creases of the paper that its strokes run over."""
    inside = strength[digit > 0]
    if not inside.size:
        return digit
    strong = inside > otsu_level(inside)
    if strong.all() or inside[strong].mean() < 2.8 * inside[~strong].mean():
        return digit
    pen = _digit_parts(digit & (strength > 0.4 * float(np.median(inside[strong]))), strength)
    # A blot on a pencil's digit is no digit.
    return pen if longest_side(pen) > 0.35 * longest_side(digit) else digit


def _sharpened(strength: Grey, digit: Mask) -> Grey:
    """The digit's strength, 0 on paper, 1 in full ink and a short ramp between, as where a bilevel scan is averaged."""
    peak = float(np.percentile(strength[digit > 0], 75))
    sharp: Grey = np.clip((strength / peak - 0.25) / 0.5, 0, 1).astype(np.float32) * grown(digit, 5)
    solid = (sharp[box_of(sharp > 0.5)] > 0.5).astype(np.uint8)
    missing = MIN_PEN * max(solid.shape) - stroke_width(solid)
    if missing <= 1:
        return sharp
    size = round(missing) + 1
    sharp = cv2.copyMakeBorder(sharp, size, size, size, size, cv2.BORDER_CONSTANT)
    return cv2.dilate(sharp, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
