"""Paper under any light, and how much darker than it each pixel is."""

from collections.abc import Iterator

import cv2
import numpy as np

from mnist_accel.parts import CORNERS, Grey, Mask, Parts, fitted, grown, is_narrow

# As a share of the image's longest side: broader than most pens' strokes, and narrower than most shadows on paper.
BROAD = 0.13


def even_light(grey: Grey) -> Grey:
    """The image under the same light everywhere, where most of what is seen in it is one slow fall of light.

    The light is a quadratic surface through most of the image, found by least squares whose weights come to leave the
    ink out (Cauchy's function of the distance).
    """
    small = fitted(grey, 32, at_least=3)
    terms = np.stack([np.broadcast_to(term, small.shape).ravel() for term in _quadratic_terms(*small.shape)], axis=1)
    weights, values = np.ones(small.size), small.ravel()
    for _ in range(10):
        root = np.sqrt(weights)
        factors = np.linalg.lstsq(terms * root[:, None], values * root, rcond=None)[0]
        off = values - terms @ factors
        weights = 1 / (1 + (off / (3 * np.median(np.abs(off)) + 1e-6)) ** 2)
    if np.var(off) > 0.15 * np.var(values):
        return grey  # other shadows have edges, and a surface would bend around them
    surface = sum(factor * term for factor, term in zip(factors, _quadratic_terms(*grey.shape), strict=True))
    light = np.maximum(np.float32(surface), np.float32(0.02))
    return np.clip(grey / light * np.median(light), 0, 1)


def _quadratic_terms(height: int, width: int) -> list[np.ndarray]:
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return [np.ones_like(x), x, y, x * x, y * y, x * y]


def denoised(grey: Grey) -> Grey:
    """The image without its finest detail: noise below a hundredth of it is no stroke."""
    return cv2.GaussianBlur(grey, (0, 0), max(0.5, max(grey.shape) / 256))


def find_ink(smooth: Grey) -> tuple[Mask, Grey, float]:
    """Where there is dark ink, how much darker than the paper each pixel is (see `_ink_strength`), and its noise."""
    strength, noise = _ink_strength(smooth, _paper(smooth))
    mask = inked(strength, noise)
    # Ink is darker than the shadows around it, and a broad pen's strokes are as dark where they are narrow.
    narrow, narrow_noise = _ink_strength(smooth, _closed(smooth, BROAD))
    strokes = inked(narrow, narrow_noise)
    if not strokes.any():
        return mask, strength, noise
    inside = narrow[strokes > 0]
    is_dark = inside >= otsu_level(inside)
    dark, faint = (float(np.median(part)) if part.size else 0.0 for part in (inside[is_dark], inside[~is_dark]))
    strokes &= narrow > 0.5 * (dark + faint)
    # The blur beside strokes is no shadow.
    rest = cv2.morphologyEx(mask & ~grown(strokes, 3), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    if rest.sum() < 0.2 * strokes.sum() or not _holds_a_digit(strokes, rest):
        return mask, strength, noise
    shadow = rest & _from_outside(smooth, rest)
    if shadow.sum() > 0.5 * rest.sum() and np.median(strength[strokes > 0]) >= 1.4 * np.median(strength[shadow > 0]):
        return strokes, narrow * grown(strokes, 5), narrow_noise
    return mask, strength, noise


def find_ink_in_even_light(smooth: Grey) -> tuple[Mask, Grey, float]:
    """The same where one threshold will do: in a drawing, or a close crop with too little paper to show a shadow."""
    is_paper = smooth * 255 > otsu(smooth)
    paper = np.full_like(smooth, np.median(smooth[is_paper]) if is_paper.any() else smooth.max())
    strength, _, noise = _darkness(smooth, paper)
    # Ink can cover most of a close crop, so its percentiles say nothing of noise. But two tones then account for most
    # of the variance; of normal noise they account for 0.64, of a ramp or uniform noise for 0.75.
    share = is_paper.mean()
    between = share * (1 - share) * (smooth[is_paper].mean() - smooth[~is_paper].mean()) ** 2 if 0 < share < 1 else 0.0
    noise = 0.0 if between > 0.75 * float(smooth.var()) else noise
    strength = np.maximum(strength, 0)
    return inked(strength, noise), strength, noise


def other_strengths(smooth: Grey) -> Iterator[tuple[Grey, float]]:
    """Other answers to how much darker than the paper each pixel is, and the noise of that, for ink dark in `smooth`.

    Shadows may have edges as sharp as strokes and be hardly broader: all that is broader than a twentieth or a tenth of
    the image counts as paper. Or strokes are rows of dots: these are joined. Or a gleam, or a pen that runs dry, leaves
    a part of the ink as faint as paper in shadow: ink is measured by the darkest that is near.
    """
    for broadest in (0.05, 0.1):
        yield _ink_strength(smooth, _closed(smooth, broadest))
    strength, noise = _ink_strength(smooth, _closed(smooth, 0.35))
    gap = _reach(smooth, 0.06)
    yield cv2.morphologyEx(strength, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (gap, gap))), noise
    reach = _reach(smooth, 0.2)
    near = cv2.blur(grown(strength, reach), (reach // 2 | 1, reach // 2 | 1))
    yield np.minimum(strength / np.maximum(near, 0.2 * float(strength.max()) + 6 * noise + 1e-6), 1), 0.0


def _holds_a_digit(strokes: Mask, rest: Mask) -> bool:
    """Whether the darkest of what was found is more than specks, or a frame with the dark spots of a digit within."""
    parts = Parts(strokes)
    at_edge = int(parts.area[parts.at_edge()].sum())
    inside = int(strokes.sum()) - at_edge
    is_frame = at_edge > 0.3 * strokes.sum() and inside < 0.2 * rest.sum()
    return parts.size.max(initial=0) >= 0.05 * max(strokes.shape) and not is_frame


def _from_outside(smooth: Grey, mask: Mask) -> Mask:
    """The parts of a mask that shadows can be: cast from outside, they reach the edge, or a broad dark that does."""
    closed = _closed(smooth, 0.35)
    broad = Parts(closed < 0.8 * np.median(closed))
    outside = broad.mask(broad.at_edge())
    outside[[0, -1]], outside[:, [0, -1]] = 1, 1
    parts = Parts(mask)
    return parts.mask(parts.touching(grown(outside, 9)))


def inked(strength: Grey, noise: float) -> Mask:
    """Where there is at least four tenths of the typical ink; nowhere if nothing stands out from the noise."""
    # The peaks of normal noise stay below 6 standard deviations; less than 2 of 255 grey levels are rounding.
    ink = strength[strength > max(6 * noise, 0.25 * float(strength.max()), 2 / 255)]
    return (strength > (0.4 * float(np.median(ink)) if ink.size else np.inf)).astype(np.uint8)


def is_dark_ink(smooth: Grey, evenly_lit: bool) -> bool:
    """Whether the ink is darker than the paper."""
    # Of the two candidates for paper - the image with all dark, or with all light strokes filled in - the true one is
    # smooth, whatever the shadows: filling in the paper between strokes leaves the digit's outline. Logarithms give ink
    # in a shadow more of the contrast that it has in the light.
    small = fitted(smooth, 64, at_least=3)
    light = small if evenly_lit else np.log2(1 + small)
    roughness = _roughness(light, evenly_lit) - _roughness(1 - light, evenly_lit)
    dark = small * 255 <= otsu(small)
    edge = float(np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).mean())
    if not evenly_lit:
        # A thick stroke and the rim of paper around it can be as smooth.
        return roughness + 0.1 * (edge - 0.5) < 0
    # Crops without paper around the digit are all outline; there, paper is what most of the edge and the corners show.
    corners = dark[CORNERS].mean()
    # Paper that covers less than half of the image, and yet all of its edge, may be a frame.
    framed = (edge > 0.95 and dark.mean() < 0.5) or (edge < 0.05 and dark.mean() > 0.5)
    return roughness + edge < 0.5 if framed else edge + corners + 0.25 * roughness < 1


def is_two_toned(grey: Grey) -> bool:
    """Whether there is nothing but two tones, as in a drawing or in a scan of one bit: no light falls on that."""
    low, high = float(grey.min()), float(grey.max())
    return bool(((grey < low + 0.03) | (grey > high - 0.03)).mean() > 0.85)


def otsu(smooth: Grey) -> float:
    """Otsu's threshold ("A threshold selection method from gray-level histograms", 1979), on a scale of 0..255."""
    return cv2.threshold((np.clip(smooth, 0, 1) * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)[0]


def otsu_level(strength: Grey) -> float:
    """Otsu's threshold of strengths, of which one at least is over 0, on their own scale."""
    highest = float(strength.max())
    return otsu(strength / highest) / 255 * highest


def _reach(smooth: Grey, share: float, evenly_lit: bool = False) -> int:
    """A share of the image's side in pixels, an odd number."""
    # In a narrow photo the longer side says little of the strokes.
    side = smooth.size**0.5 if is_narrow(smooth) and not evenly_lit else max(smooth.shape)
    return int(share * side) | 1


def _closed(smooth: Grey, share: float, evenly_lit: bool = False) -> Grey:
    """The image with all that is dark and narrower than this share of it filled in; edges of what is broader stay."""
    reach = _reach(smooth, share, evenly_lit)
    return cv2.morphologyEx(smooth, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))


def _paper(smooth: Grey, evenly_lit: bool = False) -> Grey:
    """The image with all that is dark and narrower than a third of it, as any pen's stroke is, filled in."""
    closed, side = _closed(smooth, 0.35, evenly_lit), _reach(smooth, 0.35, evenly_lit) // 4 | 1
    even = cv2.blur(closed, (side, side))
    # Beyond the sharp edge of a shadow, which reaches in from outside, this is too bright: the dark would pass for ink.
    dark = Parts(closed < 0.9 * even)
    return np.where(dark.mask(dark.at_edge()), closed, even)


def _roughness(smooth: Grey, evenly_lit: bool) -> float:
    """Mean slope of the paper, if the ink were dark, per image length and over the ink's contrast; 6 without ink."""
    paper = _paper(smooth, evenly_lit)
    contrast = paper - smooth
    contrast = contrast - np.percentile(contrast, 30)
    highest = float(contrast.max())
    if highest <= 0:
        return 6.0
    typical = float(np.median(contrast[contrast > 0.3 * highest]))
    return min(float(np.hypot(*np.gradient(paper)).mean()) * max(smooth.shape) / typical / 3, 2.0)


def _ink_strength(smooth: Grey, paper: Grey) -> tuple[Grey, float]:
    """How much darker each pixel is than the paper, as a share of the paper's brightness, and the noise of that."""
    strength, blank, noise = _darkness(smooth, paper)
    return np.maximum(strength - blank, 0), noise


def _darkness(smooth: Grey, paper: Grey) -> tuple[Grey, float, float]:
    """How much darker each pixel is than the paper, how much blank paper is, and the noise of that."""
    # Ink takes a share of the light that falls on it, so in a shadow both are less by the same factor. The constant
    # keeps the noise of the deepest shadows down.
    strength = (paper - smooth) / (paper + 0.1)
    tenth, blank, middle = np.percentile(strength, (10, 30, 50))
    # Of normal noise, neighbours of these percentiles lie 0.76 and 0.52 standard deviations apart. Light mortar between
    # dark bricks widens one of the gaps.
    return strength, blank, float(min((blank - tenth) / 0.76, (middle - blank) / 0.52))
