"""Tell the ink of one digit from paper, shadows, ruled lines, frames, specks and the neighbours' strokes."""

from collections.abc import Iterator

import cv2
import numpy as np

from mnist_accel.lines import foreign_parts
from mnist_accel.paper import (
    denoised,
    find_ink,
    find_ink_in_even_light,
    inked,
    is_dark_ink,
    is_two_toned,
    other_strengths,
    otsu,
    otsu_level,
)
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
from mnist_accel.strokes import Digit

# The four corners of a sheet of paper, (4, 2) float32: x and y in pixels.
Sheet = np.ndarray


def find_digit(grey: Grey) -> Digit | None:
    """The digit in an image of either polarity, (H, W) float32 in 0..1; None where there is no ink.

    The longest side is 96 to 224 pixels: ink is judged at the scale of whole strokes.
    """
    smooth = denoised(grey)
    evenly_lit = is_two_toned(grey)
    find = find_ink_in_even_light if evenly_lit else find_ink
    if not is_dark_ink(smooth, evenly_lit):
        smooth = 1 - smooth
    mask, strength, noise = find(smooth)
    if not mask.any() or _too_broad(mask):
        # Where a sheet of paper fills most of the image, its desk can pass for the paper and the sheet for noise.
        other = find(1 - smooth)
        if not mask.any() or _is_patch_of_light(mask, other[0], smooth):
            smooth, (mask, strength, noise) = 1 - smooth, other
    mask, strength = _filled(mask, strength, smooth)
    foreign = foreign_parts(mask, strength)
    if foreign.any():
        # A printed frame can be many times darker than a pencil's digit: look again without it and its blur.
        rest = _without(foreign, mask, strength)
        ink = inked(rest, noise)
        parts = Parts(ink)
        shading = parts.at_edge() & (parts.sums(mask) < 0.5 * parts.area)  # which only the frame had outshone
        digit = _digit(ink & ~parts.mask(shading), rest)
        # A zero that fills the image lies along its edges as a frame does, and nothing as large as a digit is left;
        # but it covers no half of one of the image's sides, as a scanner's dark edge does.
        sides = foreign[0], foreign[-1], foreign[:, 0], foreign[:, -1]
        least = 0.04 if max(side.mean() for side in sides) > 0.5 else 0.12
        if longest_side(digit) > least * max(digit.shape) and not _is_shading(strength, digit):
            return Digit(rest, digit, noise)
    digit = _digit(mask, strength)
    return Digit(strength, digit, noise) if digit.any() and not _is_shading(strength, digit) else None


def find_digit_of_crop(grey: Grey, tiny: bool) -> Digit | None:
    """As `find_digit`, in an image so small or so narrow that it must be a crop of the digit alone.

    Then its ink may touch every edge, and a bar along an edge is a 7's or a 2's, not a frame's. Where it was so `tiny`
    before it was enlarged that even a stroke's edge fades slowly, that is no sign of uneven light.
    """
    smooth = denoised(grey)
    mask, strength, noise = find_ink_in_even_light(smooth if is_dark_ink(smooth, evenly_lit=True) else 1 - smooth)
    digit = _digit(mask, strength)
    return Digit(strength, digit, noise) if digit.any() and (tiny or not _is_shading(strength, digit)) else None


def find_digit_across(grey: Grey) -> Digit | None:
    """As `find_digit`, where nearly all ink is one piece that reaches from one edge of the image to the opposite one.

    So it is in a close crop of a digit. But it might be a digit with a line of its grid, or a shadow's edge.
    """
    digit = find_digit_of_crop(grey, tiny=True)
    if digit is None:
        return None
    parts = Parts(digit.mask)
    largest = parts.largest()
    across = (parts.start[largest] == 0) & (parts.end[largest] == digit.mask.shape[::-1])
    all_ink = inked(digit.darkness, digit.noise).sum()
    if not across.any() or parts.area[largest] <= 0.95 * all_ink:
        return None
    box = box_of(digit.mask)
    is_frame = without_holes(digit.mask)[box].mean() > 0.9 and digit.mask[box].mean() < 0.6
    return None if is_frame else digit


def other_readings(grey: Grey) -> Iterator[Digit]:
    """What else the digit could be, as from `find_digit`, in an image where that shows no digit.

    Any of `other_strengths`, dark or light, all of it or what is darkest of it.
    """
    smooth = denoised(grey)
    for dark in (smooth, 1 - smooth):
        for strength, noise in other_strengths(dark):
            for darkest in (False, True):
                digit = _reading(strength, noise, darkest)
                if digit is not None:
                    yield digit


def _reading(strength: Grey, noise: float, darkest: bool) -> Digit | None:
    def ink(of: Grey) -> Mask:
        mask = inked(of, noise)
        return mask & (of > otsu_level(of[mask > 0])) if darkest and mask.any() else mask

    mask = ink(strength)
    if not mask.any():
        return None
    foreign = foreign_parts(mask, strength)
    rest = _without(foreign, mask, strength)
    digit = _of_one_pen(_digit_parts(ink(rest), rest), rest)
    return Digit(rest, digit, noise) if digit.any() else None


def _without(foreign: Mask, mask: Mask, strength: Grey) -> Grey:
    """The strength without foreign parts and their blur, of which what else is in the mask is left alone."""
    return strength * (1 - (grown(foreign, 5) & ~(mask & ~foreign)))


def _is_broad(mask: Mask) -> bool:
    """Whether a disc broader than any pen's stroke fits into the mask."""
    return 2 * float(distance_to_paper(mask).max()) > 0.2 * max(mask.shape)


def _too_broad(mask: Mask) -> bool:
    """Whether the mask is broader than any stroke, and is no sheet of paper."""
    return _is_broad(mask) and find_sheet(mask) is None


def _is_patch_of_light(mask: Mask, ink: Mask, smooth: Grey) -> bool:
    """Whether the mask, dark in `smooth`, is light (or a shadow) on the paper, as ink of the other side shows.

    That stands out from the paper beside the patch too, and does not reach the image's edge as uneven light does.
    """
    both = mask | ink
    if not ink.any() or both.all() or _too_broad(ink) or Parts(ink).at_edge().any():
        return False
    patch, paper, stroke = (float(np.median(smooth[part > 0])) for part in (mask, 1 - both, ink))
    return stroke - paper > 0.2 * (paper - patch)


def _filled(mask: Mask, strength: Grey, smooth: Grey) -> tuple[Mask, Grey]:
    """Mask and strength, with the inside of a shape too broad for `_paper` to see past, found as its outline only."""
    inside = without_holes(mask)
    around = grown(inside, 11) & ~grown(inside, 5)
    holes = Parts(inside & ~mask)
    if not holes or not around.any() or holes.size[holes.largest()].min() <= 0.1 * max(mask.shape):
        return mask, strength
    hole = holes.mask(holes.largest())
    outline, enclosed, paper = (float(np.median(smooth[part > 0])) for part in (mask, hole, around))
    if abs(enclosed - outline) < 0.2 * abs(paper - outline):
        filled = mask | hole  # a filled square would read as a zero otherwise
    elif abs(outline - paper) < 0.2 * abs(enclosed - outline):
        filled = hole  # a bright shape where dark ink was assumed: its outline is a halo, as dark as all around it
    else:
        return mask, strength
    return filled, np.where(hole > 0, np.median(strength[mask > 0]), strength * filled)


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


def find_sheet(found: Mask) -> Sheet | None:
    """The sheet, note or plate that was found instead of the digit on it; None where it is no such thing."""
    sheet = _written_sheet(found, found, torn=False)
    return _solid_card(found) if sheet is None else sheet


def find_light_sheet(grey: Grey) -> Sheet | None:
    """A sheet with strokes on it, all of it in the image, on something much darker, whatever shadows cross it."""
    smooth = denoised(grey)
    level = otsu(smooth) / 255
    # Where the sun falls on a half of the sheet, the other half is nearer to the desk in brightness than to it.
    for lowest in (otsu(np.minimum(smooth, level)) / 255, level):
        sheet = _sheet_lighter_than(smooth, lowest)
        if sheet is not None:
            return sheet
    return None


def _sheet_lighter_than(smooth: Grey, level: float) -> Sheet | None:
    light = (smooth > level).astype(np.uint8)
    gap = int(0.11 * max(light.shape)) | 1  # strokes and shadows are narrower
    # A tag's string, or a gleam on the desk, leads from the sheet to the image's edge.
    broad = cv2.morphologyEx(light, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    closed = cv2.copyMakeBorder(broad, gap, gap, gap, gap, cv2.BORDER_CONSTANT)
    closed = cv2.morphologyEx(closed, cv2.MORPH_CLOSE, np.ones((gap, gap), np.uint8))[gap:-gap, gap:-gap]
    parts = Parts(closed)
    if not parts or parts.at_edge()[parts.largest()] or parts.area[parts.largest()] < 0.2 * light.size:
        return None
    whole = parts.mask(parts.largest())
    around = float(np.median(smooth[whole == 0]))
    is_lighter = float(np.median(smooth[(light & whole) > 0])) > 1.5 * around
    return _written_sheet(light & whole, whole, torn=True) if is_lighter else None


def _written_sheet(found: Mask, whole: Mask, torn: bool) -> Sheet | None:
    """The sheet with strokes on it, lying on something of another brightness, that was found instead of a digit.

    That is a disc or a rectangle, seen aslant perhaps, or where it may be `torn` any shape without deep bays, with
    holes much narrower than what is left of it beside them: the counters of a bold zero or eight are not. None where
    nothing of the kind was found. `whole` is what was found, with the gaps filled that shadows cut into its outline.
    """
    outlines = cv2.findContours(whole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    outline = max(outlines, key=cv2.contourArea)
    hull = cv2.convexHull(outline)
    corners = cv2.approxPolyDP(hull, 0.04 * cv2.arcLength(hull, True), True)
    middle, size, degrees = cv2.minAreaRect(outline)
    area, radius = cv2.contourArea(outline), cv2.minEnclosingCircle(outline)[1]
    is_round = area > 0.9 * np.pi * radius**2
    of_rectangle, of_hull = area / (size[0] * size[1] + 1e-6), area / (cv2.contourArea(hull) + 1e-6)
    regular = is_round or (len(corners) == 4 and (of_rectangle >= 0.8 or of_hull > 0.95))
    if min(size) < 0.1 * max(found.shape) or not (regular or (torn and of_hull > 0.85)):
        return None
    sheet = cv2.drawContours(np.zeros_like(found), [outline], -1, 1, cv2.FILLED)
    strokes = sheet & ~found
    longest = Parts(strokes).size.max(initial=0)
    if longest < (0.1 if regular else 0.3) * min(size):
        return None
    blank = float(distance_to_paper(sheet & found).max())
    # A pen can fill the loop of a six, which then is no measure of it; and no zero is as rectangular.
    stroke = stroke_width(strokes) / 2 if of_rectangle > 0.93 else float(distance_to_paper(strokes).max())
    # A round zero whose counter is narrower than its strokes would need a pen of a third of its width. The counters of
    # a bold eight are short, and those of a six and a nine are round.
    widest = (1.0 if is_round else 0.6) * blank if regular else min(0.25 * blank, 0.15 * longest)
    if blank <= 0.1 * min(size) or stroke >= widest:
        return None
    if not regular:  # of a scrap, what surrounds the strokes
        left, top, width, height = cv2.boundingRect(strokes)
        margin = 0.6 * max(width, height)
        return cv2.boxPoints(((left + width / 2, top + height / 2), (width + margin, height + margin), 0.0))
    if is_round:  # of a badge, the square within it
        return cv2.boxPoints((middle, (0.77 * size[0], 0.77 * size[1]), 0.0))
    aslant = of_rectangle < 0.9 and of_hull > 0.95
    return corners[:, 0].astype(np.float32) if aslant else cv2.boxPoints((middle, size, degrees))


def _solid_card(found: Mask) -> Sheet | None:
    """The note or plate that was found as one filled rectangle: darker than what it lies on, as its ink is than it."""
    outlines = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    if len(outlines) != 1:
        return None
    middle, size, degrees = cv2.minAreaRect(outlines[0])
    # A narrow one upright is a one; no digit lies flat, but a strip of tape does.
    high, wide = found[box_of(found)].shape
    if min(size) < 0.1 * max(found.shape) or (high > wide and min(size) < 0.5 * max(size)):
        return None
    return cv2.boxPoints((middle, size, degrees)) if found.sum() > 0.93 * size[0] * size[1] else None


def upright(values: np.ndarray, sheet: Sheet, scale: float) -> np.ndarray:
    """What lies within a sheet of paper, which is given at 1/`scale` of the size of (H, W, C), seen from above."""
    right, down = (sheet - sheet.mean(0)).T
    corners = sheet[np.argsort(np.arctan2(down, right))] * scale  # clockwise
    corners = np.roll(corners, -int(corners.sum(1).argmin()), axis=0)  # from the upper left
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
    width, height = (sides[:2] + sides[2:]) / 2
    # A little less than all: what lies under the sheet must not show at its edges.
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.04 * np.array([width, height])
    view = cv2.getPerspectiveTransform(corners.astype(np.float32), target.astype(np.float32))
    size = int(0.92 * width) + 1, int(0.92 * height) + 1
    seen = cv2.warpPerspective(values, view, size, borderMode=cv2.BORDER_REPLICATE)
    return seen.reshape(size[1], size[0], values.shape[2])


def _digit(ink: Mask, strength: Grey) -> Mask:
    """The digit among all ink; where it is a plate, broader than any stroke, with the counters of the digit on it."""
    digit = _of_one_pen(_digit_parts(ink, strength), strength)
    return digit | (ink & without_holes(digit)) if _is_broad(digit) else digit


def _digit_parts(mask: Mask, strength: Grey) -> Mask:
    """The part of the mask with most ink nearest to the middle, and the parts that belong to it."""
    parts = Parts(mask)
    if not parts:
        return mask
    at_edge, area, mass = parts.at_edge(), parts.area, parts.sums(strength)
    off_centre = np.hypot(*(parts.middle / mask.shape[::-1] - 0.5).T)
    # A line drawn under the digit can have more ink than the digit.
    flat = parts.size[:, 0] > 4 * parts.size[:, 1]
    # A magnet, a pin or a hole that was punched is as dark as ink and solid.
    solid = (area > 0.7 * parts.size.prod(1)) & (parts.size.max(1) < 1.7 * parts.size.min(1))
    score = mass * (1 - 0.8 * off_centre) * np.where(at_edge, 0.5, 1.0) * np.where(flat | solid, 0.3, 1.0)
    kept = score == score.max()
    main_at_edge = at_edge[kept].any()
    pen = stroke_width(parts.mask(score.argmax()))
    spot = solid & (parts.size.min(1) > 2 * pen)
    while True:
        # More than specks, and close to what is kept.
        start, end = parts.start[kept].min(0), parts.end[kept].max(0)
        longest, gaps = (end - start).max(), np.maximum(start - parts.end, parts.start - end)
        # What lies around it is the shadow of its sheet, or half a frame.
        inset = 0.2 * (end - start)
        around = ((parts.start < start + inset) & (parts.end > end - inset)).all(1)
        close = (area > 0.03 * area[kept].sum()) & (gaps.max(1) <= 0.25 * longest)
        # What reaches the image's edge while the main part does not is a neighbour's.
        overlaps = ((parts.middle > start) & (parts.middle < end)).all(1)
        # Where a slanting line is in its middle; one end of it is higher. No bar of a digit is as long as it is high.
        below = parts.middle[:, 1] - 0.5 * area / parts.size[:, 0] - end[1]
        underline = flat & (below > np.where(parts.size[:, 0] > 0.9 * longest, 0, 0.05 * longest))
        # Words and buttons above and below: low, and wider than the dots that a pen leaves.
        tall = parts.size[:, 1] / (end - start)[1]
        label = (gaps[:, 1] > 0.1 * longest) & (tall < 0.25) & (parts.size[:, 0] > 1.5 * pen)
        own = close & (main_at_edge | ~at_edge | overlaps) & ~underline & ~label
        # A second digit, whole and about as large: there is no telling which is meant, and both are to be seen.
        second = ~at_edge & (tall > 0.6) & (tall < 1.6)
        second &= (mass > 0.3 * mass[kept].max()) & (area > 0.3 * area[kept].max())
        more = (own | second) & ~kept & ~spot & ~around
        if not more.any():
            return parts.mask(kept)
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
