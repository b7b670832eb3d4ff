"""Tell the ink of one digit from paper, shadows, ruled lines, frames, specks and the neighbours' strokes."""

from dataclasses import dataclass

import cv2
import numpy as np

# (H, W) float32 in 0..1, and (H, W) uint8 of 0 and 1.
Grey = np.ndarray
Mask = np.ndarray

# The pen's width as a share of the digit's longest side: three of four MNIST digits are written with a wider one.
MIN_PEN = 0.09


@dataclass(frozen=True)
class Ink:
    """A digit's ink: strength (H, W) float32 in 0..1, 0 off the digit; box as top, left, bottom, right in pixels."""

    strength: Grey
    box: tuple[int, int, int, int]


def fitted(image: np.ndarray, side: int, at_least: int = 1, how: int = cv2.INTER_AREA) -> np.ndarray:
    """The image scaled so that its longest side is `side` pixels, its aspect ratio kept."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(at_least, round(width * scale)), max(at_least, round(height * scale))
    return cv2.resize(image, size, interpolation=how)


def find_digit(grey: Grey, tight: bool) -> Ink | None:
    """The ink of the digit in an image of either polarity; None where there is no ink.

    Args:
        grey: (H, W) float32 in 0..1, 96 to 224 pixels on its longest side: ink is judged at the scale of whole strokes.
        tight: the image is so small or so narrow that it must be a crop of the digit alone. Then its ink may touch
            every edge, and a bar along an edge is a 7's or a 2's, not a frame's.
    """
    # Noise below a hundredth of the image is no stroke.
    smooth = cv2.GaussianBlur(grey, (0, 0), max(0.5, max(grey.shape) / 256))
    if not is_dark_ink(smooth, tight):
        smooth = 1 - smooth
    strength, noise = ink_strength(smooth, tight)
    mask = _inked(strength, noise)
    if tight:
        digit = digit_parts(mask, strength)
        return None if digit is None else sharpened(strength, digit)
    outlined, mask = mask, _filled(mask, smooth)
    if mask is not outlined:
        strength = np.where((mask > 0) & (outlined == 0), strength[outlined > 0].max(), strength * mask)
    foreign = foreign_parts(mask)
    if foreign.any():
        # A printed frame can be many times darker than a pencil's digit: look again without it and its blur.
        blur = cv2.dilate(foreign, np.ones((5, 5), np.uint8)) & (1 - (mask & (1 - foreign)))
        rest = strength * (1 - blur)
        digit = digit_parts(_inked(rest, noise), rest)
        # A zero that fills the image lies along its edges as a frame does: then nothing as large as a digit is left.
        if digit is not None and not _is_shading(strength, digit):
            top, left, bottom, right = box_of(digit > 0)
            if max(bottom - top, right - left) > 0.2 * max(digit.shape):
                return sharpened(rest, digit)
    digit = digit_parts(mask, strength)
    return None if digit is None or _is_shading(strength, digit) else sharpened(strength, digit)


def _inked(strength: Grey, noise: float) -> Mask:
    """Where there is at least four tenths of the typical ink; nowhere if nothing stands out from the noise."""
    # The peaks of normal noise stay below 6 standard deviations; less than 2 of 255 grey levels are rounding.
    ink = strength[strength > max(6 * noise, 0.25 * float(strength.max()), 2 / 255)]
    return (strength > (0.4 * float(np.median(ink)) if ink.size else np.inf)).astype(np.uint8)


# --- paper and polarity ----------------------------------------------------------------------------------------------


def is_dark_ink(smooth: Grey, tight: bool) -> bool:
    """Whether the ink is darker than the paper, in (H, W) float32.

    Of the two candidates for paper - the image with all dark, or with all light strokes filled in - the true one is
    smooth, whatever the shadows: filling in the paper between strokes leaves the digit's outline. Crops without paper
    around the digit are all outline; there, paper is what most of the edge and the corners show.
    """
    small = fitted(smooth, 64, at_least=3)
    roughness = _roughness(small) - _roughness(1 - small)
    if not tight:
        return roughness < 0
    dark = small * 255 <= _otsu(small)
    edge = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).mean()
    corners = dark[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    # Paper that covers less than half of the image, and yet all of its edge, is a frame.
    framed = (edge > 0.95 and dark.mean() < 0.5) or (edge < 0.05 and dark.mean() > 0.5)
    return roughness < 0 if framed else edge + corners + 0.25 * roughness < 1


def _otsu(smooth: Grey) -> float:
    """Otsu's threshold ("A threshold selection method from gray-level histograms", 1979), on a scale of 0..255."""
    return cv2.threshold((np.clip(smooth, 0, 1) * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)[0]


def _paper(smooth: Grey) -> Grey:
    """The image with all that is dark and narrower than a third of it filled in from around (a grey closing)."""
    # Strokes are at most a fifth of a digit, those of a felt pen a little more.
    reach = int(0.35 * max(smooth.shape)) | 1
    closed = cv2.morphologyEx(smooth, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_RECT, (reach, reach)))
    return cv2.blur(closed, (reach // 4 | 1, reach // 4 | 1))


def _roughness(smooth: Grey) -> float:
    """Mean slope of the paper, if the ink were dark, per image length and over the ink's contrast to it; 6 at most."""
    paper = _paper(smooth)
    contrast = paper - smooth
    contrast = contrast - np.percentile(contrast, 30)
    highest = float(contrast.max())
    if highest <= 0:
        return 6.0
    typical = float(np.median(contrast[contrast > 0.3 * highest]))
    slope_y, slope_x = np.gradient(paper)
    return min(float(np.hypot(slope_x, slope_y).mean()) * max(smooth.shape) / typical / 3, 2.0)


def ink_strength(smooth: Grey, tight: bool) -> tuple[Grey, float]:
    """How much darker each pixel is than the paper, as a share of the paper's brightness, and the noise of that."""
    if tight:
        # Archives' scans have even light, and so close a crop has too little paper to follow a shadow on.
        is_paper = smooth * 255 > _otsu(smooth)
        paper = np.full_like(smooth, np.median(smooth[is_paper]) if is_paper.any() else 1.0)
    else:
        paper = _paper(smooth)
    # Ink takes a share of the light that falls on it, so in a shadow both are less by the same factor. The constant
    # keeps the noise of the deepest shadows down.
    strength = (paper - smooth) / (paper + 0.1)
    tenth, low = np.percentile(strength, (10, 30))
    # Of normal noise, these two percentiles lie 0.76 standard deviations apart.
    noise = float(low - tenth) / 0.76
    if not tight:
        return np.maximum(strength - low, 0), noise
    # Ink can cover most of a close crop, so its percentiles say nothing of noise. But two tones then account for most
    # of the variance; of normal noise they account for 0.64, of a ramp or uniform noise for 0.75.
    share = is_paper.mean()
    between = share * (1 - share) * (smooth[is_paper].mean() - smooth[~is_paper].mean()) ** 2 if 0 < share < 1 else 0.0
    return np.maximum(strength, 0), 0.0 if between > 0.75 * float(smooth.var()) else noise


def _filled(mask: Mask, smooth: Grey) -> Mask:
    """The mask itself, or with the inside of a shape too broad for `_paper` to see past, found as its outline only.

    A filled square would read as a zero otherwise. Where dark ink was assumed and the shape is bright, the outline is a
    halo, as dark as all around it: then the shape is what it encloses.
    """
    inside = np.zeros_like(mask)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(inside, contours, -1, 1, cv2.FILLED)
    near, far = (np.asarray(cv2.dilate(inside, np.ones((side, side), np.uint8)), np.uint8) for side in (5, 11))
    around = far & (1 - near)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(inside & (1 - mask), connectivity=8)
    if count < 2 or not around.any():
        return mask
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    if min(stats[largest, cv2.CC_STAT_WIDTH], stats[largest, cv2.CC_STAT_HEIGHT]) <= 0.1 * max(mask.shape):
        return mask
    hole = (labels == largest).astype(np.uint8)
    outline, enclosed, paper = (float(np.median(smooth[part > 0])) for part in (mask, hole, around))
    if abs(enclosed - outline) < 0.2 * abs(paper - outline):
        return mask | hole
    return hole if abs(outline - paper) < 0.2 * abs(enclosed - outline) else mask


def _is_shading(strength: Grey, part: Mask) -> bool:
    """Whether what was found fades slowly into its surroundings, as uneven light does: a pen's stroke ends.

    Measured a fortieth of the image off it, beyond a bad lens's blur: there, ink leaves less than a sixth of itself
    along most of its outline.
    """
    side = max(part.shape)
    distance = cv2.distanceTransform(1 - part, cv2.DIST_L2, 3)
    around = strength[(distance > side / 60) & (distance <= side / 25)]
    return bool(around.size and np.median(around) > strength[part > 0].mean() / 6)


# --- lines and frames ------------------------------------------------------------------------------------------------


def foreign_parts(mask: Mask) -> Mask:
    """What is no part of the digit: frames, the lines of tables and of ruled paper, what reaches in from outside."""
    foreign = _crossing_lines(mask)
    height, width = mask.shape
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask & (1 - foreign), connectivity=8)
    border = np.ones_like(mask)
    depth_y, depth_x = round(0.15 * height), round(0.15 * width)
    border[depth_y : height - depth_y, depth_x : width - depth_x] = 0
    share_at_border = np.bincount(labels.ravel(), weights=border.ravel(), minlength=count) / stats[:, cv2.CC_STAT_AREA]
    drop = [False] * count
    for label in range(1, count):
        x, y, wide, high = (int(v) for v in stats[label, :4])
        at_edge = x == 0 or y == 0 or x + wide == width or y + high == height
        drop[label] = at_edge and share_at_border[label] > 0.85
        if wide > 0.5 * width and high > 0.5 * height:
            drop[label] |= _is_frame(labels[y : y + high, x : x + wide] == label)
    return foreign | np.array(drop, np.uint8)[labels]


def _is_frame(component: np.ndarray) -> bool:
    """Whether a component follows its bounding box on all four sides, corners included, and leaves the middle free."""
    height, width = component.shape
    y, x = max(2, round(0.12 * height)), max(2, round(0.12 * width))
    sides = component[:y].any(0), component[-y:].any(0), component[:, :x].any(1), component[:, -x:].any(1)
    return min(side.mean() for side in sides) > 0.9 and not component[2 * y : -2 * y, 2 * x : -2 * x].any()


def _crossing_lines(mask: Mask) -> Mask:
    """Straight lines that run through the whole image.

    A stroke of the digit that does so (a 7's bar, or a 4's stem, in a close crop) is told from a line by what is left:
    without the line, the digit stands free of the image's edges; without the bar, the 7's stem still reaches one. A
    line through the middle must also be thinner than the pen.
    """
    height, width = mask.shape
    lines = _level_lines(mask) + [np.ascontiguousarray(line.T) for line in _level_lines(np.ascontiguousarray(mask.T))]
    if not lines:
        return np.zeros_like(mask)
    together = np.bitwise_or.reduce(lines)
    rest = mask & (1 - together)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(rest, connectivity=8)
    if count < 2:
        return np.zeros_like(mask)
    main = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    left, top, wide, high = (int(v) for v in stats[main, :4])
    free = left > 0 and top > 0 and left + wide < width and top + high < height
    digit = (labels == main).astype(np.uint8)
    near = cv2.dilate(digit, np.ones((3, 3), np.uint8))
    pen = stroke_width(digit)
    result = np.zeros_like(mask)
    for line in lines:
        rows, columns = np.flatnonzero(line.any(1)), np.flatnonzero(line.any(0))
        at_border = min(rows[-1], columns[-1]) < 0.2 * max(height, width) or (
            max(rows[0] / height, columns[0] / width) > 0.8
        )
        touches = bool((near & line).any())
        if not touches or (free and (at_border or stroke_width(line) < 0.6 * pen)):
            result |= line
    return result


def _level_lines(mask: Mask) -> list[Mask]:
    """The pixels of each line within about 5 degrees of level that runs from the left edge to the right."""
    height, width = mask.shape
    # A slanting line is a staircase of runs; thickened a little, runs of a quarter of the width hold together.
    thick = cv2.dilate(mask, np.ones((round(0.02 * height) | 1, 1), np.uint8))
    runs = cv2.morphologyEx(thick, cv2.MORPH_OPEN, np.ones((1, max(3, width // 4)), np.uint8)) & mask
    count, labels, stats, _ = cv2.connectedComponentsWithStats(runs, connectivity=8)
    lines = []
    for label in range(1, count):
        _, _, wide, high, area = (int(v) for v in stats[label])
        if wide < 0.98 * width or high > 0.25 * height or area > 0.12 * height * wide:
            continue
        # Strokes that cross the line are taller than it is thick: they stay whole.
        tall = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((int(1.7 * area / wide) + 3, 1), np.uint8))
        line = (labels == label).astype(np.uint8) & (1 - tall)
        if line.any():
            lines.append(line)
    return lines


def stroke_width(mask: Mask) -> float:
    """The typical width of a mask's strokes in pixels: twice the median distance of their middles from the paper."""
    distance = cv2.distanceTransform(cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.DIST_L2, 3)
    middle = distance[(distance > 0) & (distance >= cv2.dilate(distance, np.ones((3, 3), np.uint8)))]
    return 2 * float(np.median(middle)) - 1 if middle.size else 0.0


# --- the digit -------------------------------------------------------------------------------------------------------


def digit_parts(mask: Mask, strength: Grey) -> Mask | None:
    """The connected parts of the mask that make up the digit; None if there are none.

    The one with most ink nearest to the middle, and those close to it that are more than specks. A part that reaches
    the image's edge while the main part does not is a neighbour's; a second digit that is there as a whole is kept.
    """
    height, width = mask.shape
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 2:
        return None
    x, y, wide, high, area = (stats[:, i].astype(np.float64) for i in range(5))
    right, bottom = x + wide, y + high
    at_edge = (x == 0) | (y == 0) | (right == width) | (bottom == height)
    mass = np.bincount(labels.ravel(), weights=strength.ravel(), minlength=count)
    off_centre = np.hypot(centroids[:, 0] / width - 0.5, centroids[:, 1] / height - 0.5)
    score = mass * (1 - 0.8 * off_centre) * np.where(at_edge, 0.5, 1.0)
    score[0] = -1
    kept = score == score.max()
    main_at_edge = bool(at_edge[kept].any())
    while True:
        left_end, top_end = x[kept].min(), y[kept].min()
        right_end, bottom_end = right[kept].max(), bottom[kept].max()
        gap_x = np.maximum(np.maximum(left_end - right, x - right_end), 0)
        gap_y = np.maximum(np.maximum(top_end - bottom, y - bottom_end), 0)
        reach = 0.25 * max(right_end - left_end, bottom_end - top_end)
        part = (area > 0.03 * area[kept].sum()) & (np.maximum(gap_x, gap_y) <= reach)
        overlaps = (np.maximum(gap_x, gap_y) == 0) & (centroids[:, 0] > left_end) & (centroids[:, 0] < right_end)
        overlaps &= (centroids[:, 1] > top_end) & (centroids[:, 1] < bottom_end)
        part &= main_at_edge | ~at_edge | overlaps
        # A second digit, whole and about as large: there is no telling which is meant, and both are to be seen.
        tall = high / (bottom_end - top_end)
        part |= (
            ~at_edge & (tall > 0.6) & (tall < 1.6) & (mass > 0.3 * mass[kept].max()) & (area > 0.3 * area[kept].max())
        )
        part[0] = False
        if not (part & ~kept).any():
            return kept[labels].astype(np.uint8)
        kept |= part


def sharpened(strength: Grey, digit: Mask) -> Ink | None:
    """The digit's strength, 0 on paper, 1 in full ink and a short ramp between, as where a bilevel scan is averaged."""
    peak = float(np.percentile(strength[digit > 0], 75))
    near = cv2.dilate(digit, np.ones((5, 5), np.uint8))
    sharp: Grey = np.clip((strength / peak - 0.25) / 0.5, 0, 1).astype(np.float32) * near
    if not (sharp > 0.5).any():
        return None
    top, left, bottom, right = box_of(sharp > 0.5)
    pen = stroke_width((sharp[top:bottom, left:right] > 0.5).astype(np.uint8))
    missing = MIN_PEN * max(bottom - top, right - left) - pen
    if missing > 1:
        size = round(missing) + 1
        sharp = cv2.copyMakeBorder(sharp, size, size, size, size, cv2.BORDER_CONSTANT)
        sharp = cv2.dilate(sharp, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    return Ink(sharp, box_of(sharp > 0.5))


def box_of(solid: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of all that is true in (H, W) bool, where anything is."""
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
