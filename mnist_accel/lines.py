"""What is drawn beside a digit or under it: the lines of ruled paper and of tables, boxes, frames, what reaches in."""

import cv2
import numpy as np

from mnist_accel.parts import CORNERS, Grey, Mask, Parts, box_of, grown, longest_side, stroke_width, without_holes


def foreign_parts(mask: Mask, strength: Grey) -> Mask:
    """What is no part of the digit: frames, the lines of tables and of ruled paper, what reaches in from outside."""
    lines = _crossing_lines(mask, strength)
    lines |= _touched_lines(mask & ~lines)
    height, width = mask.shape
    rest = mask & ~lines
    parts = Parts(rest)
    border = np.ones_like(mask)
    depth_y, depth_x = round(0.15 * height), round(0.15 * width)
    border[depth_y : height - depth_y, depth_x : width - depth_x] = 0
    foreign = parts.at_edge() & (parts.sums(border) / parts.area > 0.85)
    for part in np.flatnonzero((parts.size > (0.2 * width, 0.2 * height)).all(1)):
        shape = parts.mask(part)
        large = (parts.size[part] > (0.5 * width, 0.5 * height)).all()
        foreign[part] |= (large and _is_frame(shape[box_of(shape)])) or _is_drawn_around(shape, rest)
    # What lies around a corner of the image is the desk beside a sheet, where a digit stands free.
    corners = np.zeros_like(mask)
    corners[CORNERS] = 1
    around = parts.touching(corners)
    others = np.where(around | foreign, 0, parts.area)
    if others.any():
        largest = others.argmax()
        if not parts.at_edge()[largest] and parts.size[largest].max() > 0.12 * max(mask.shape):
            foreign |= around
    return lines | parts.mask(foreign)


def _is_frame(shape: Mask) -> bool:
    """Whether a shape follows its bounding box on all four sides, corners included, and leaves the middle free."""
    height, width = shape.shape
    y, x = max(2, round(0.12 * height)), max(2, round(0.12 * width))
    sides = shape[:y].any(0), shape[-y:].any(0), shape[:, :x].any(1), shape[:, -x:].any(1)
    return min(side.mean() for side in sides) > 0.9 and not shape[2 * y : -2 * y, 2 * x : -2 * x].any()


def _is_drawn_around(shape: Mask, mask: Mask) -> bool:
    """Whether a thin ring or box, about as wide as high, has ink inside that is a good deal of its height."""
    height, width = shape[box_of(shape)].shape
    if not 0.75 < width / height < 1.33:
        return False
    gap = round(0.15 * height) | 1  # between the ends of a ring that was drawn by hand
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (gap, gap))
    closed: Mask = cv2.morphologyEx(shape, cv2.MORPH_CLOSE, disc)
    # A disc reaches through a wider gap in a thin ring. What bridges it is the ring's hull, along which the rest lies.
    bridge: Mask = cv2.polylines(np.zeros_like(shape), [cv2.convexHull(cv2.findNonZero(shape))], True, 1)
    if (bridge & ~grown(shape, round(0.08 * height) | 1)).sum() < 0.2 * bridge.sum():
        closed |= bridge
    filled = without_holes(closed)
    holes = Parts(filled & ~closed)
    if not holes:
        return False
    hole = holes.mask(holes.largest())
    inside = hole & mask
    return hole.sum() > 0.6 * filled.sum() and inside[box_of(inside)].shape[0] > 0.28 * height


def _crossing_lines(mask: Mask, strength: Grey) -> Mask:
    """Straight lines that run through the whole image, and are no strokes of the digit."""
    lines = _ruled_lines(mask) + [line.T for line in _ruled_lines(mask.T.copy())]
    result = np.zeros_like(mask)
    if not lines:
        return result
    rest = Parts(mask & ~np.bitwise_or.reduce(lines))
    if not rest:
        return result
    # A 7's bar, or a 4's stem, in a close crop, is told from a line by what is left: without the line, the digit stands
    # free of the image's edges; without the bar, the 7's stem still reaches one. A line through the middle must also be
    # thinner than the pen. A printed line can also be told by its being darker than what was written.
    height, width = mask.shape
    digit, free = rest.mask(rest.largest()), not rest.at_edge()[rest.largest()]
    near, pen, longest = grown(digit, 3), stroke_width(digit), longest_side(digit)
    across, ink = box_of(digit)[1], float(np.median(strength[digit > 0]))
    for line in lines:
        rows, columns = box_of(line)
        at_border = min(rows.stop, columns.stop) - 1 < 0.2 * max(height, width)
        at_border |= max(rows.start / height, columns.start / width) > 0.8
        # No bar of a digit reaches far beyond it on both sides.
        level = columns.stop - columns.start > rows.stop - rows.start
        beyond = level and min(across.start, width - across.stop) > 0.25 * longest
        printed = at_border and float(np.median(strength[line > 0])) > 1.25 * ink
        if not (near & line).any() or printed or (free and (at_border or beyond or stroke_width(line) < 0.6 * pen)):
            result |= line
    # Where two lines cross, the dot that each of them takes for a stroke of the other is left.
    left = Parts(mask & ~result)
    dots = left.touching(grown(result, 3)) & (left.size.max(1) <= 2.5 * stroke_width(result) + 2)
    return result | left.mask(dots)


def _touched_lines(mask: Mask) -> Mask:
    """Straight lines that the digit touches and that are no strokes of it: one to write on, a box that it crosses."""
    result = np.zeros_like(mask)
    parts = Parts(mask)
    extents = np.where(parts.at_edge(), 0, parts.size.max(1))
    extent = extents.max(initial=0)
    if extent < 0.12 * max(mask.shape):
        return result
    whole = parts.mask(extents.argmax())
    box = box_of(whole)
    shape = whole[box]
    level = _level_lines(shape, 0.5 * extent, 0.12)
    upright = [line.T for line in _level_lines(shape.T.copy(), 0.5 * extent, 0.12)]
    if len(level) > 1 and len(upright) > 1:
        strokes = shape & ~np.bitwise_or.reduce(level + upright)
        pen = max(stroke_width(each) for each in [*level, *upright, strokes])
        thin = [[line for line in each if stroke_width(line) < 0.6 * pen] for each in (level, upright)]
        if min(len(each) for each in thin) > 1:
            result[box] = np.bitwise_or.reduce(thin[0] + thin[1])
            return result
    for line in level:
        rest = Parts(shape & ~line)
        if not rest:
            continue
        digit = rest.mask(rest.largest())
        across, along, longest = box_of(digit)[1], box_of(line)[1], longest_side(digit)
        beyond = min(across.start - along.start, along.stop - across.stop)
        # No bar of a digit is longer than the digit, and reaches beyond the rest of it on both sides.
        if along.stop - along.start > 1.2 * longest and beyond > 0.1 * longest:
            result[box] |= line
    return result


def _ruled_lines(mask: Mask) -> list[Mask]:
    """The pixels of each line that crosses the whole mask from left to right: about level, or aslant with others."""
    height, width = mask.shape
    level = _level_lines(mask, 0.98 * width, 0.25)
    # Along the lines of a page that was held aslant, the ink's sums are the most unequal.
    y, x = np.nonzero(mask[:, ::4])
    sums = {slope: np.bincount((y + 4 * slope * x + width).astype(int)) for slope in np.linspace(-0.4, 0.4, 21)}
    slope = max(sums, key=lambda slope: int(sums[slope] @ sums[slope]))
    column = np.arange(width)
    shift = np.rint(slope * column).astype(int)
    if not shift.any():
        return level
    # The mask is slid, column by column, until these lines are level.
    row = np.arange(height)[:, None] + shift - shift.min()
    slid = np.zeros((row.max() + 1, width), np.uint8)
    slid[row, column] = 1
    room = slid.sum(1)  # how long a line at each height can be
    slid[row, column] = mask
    aslant = [line[row, column] for line in _level_lines(slid, 0.98 * room, 0.25)]
    # A single one can be a stroke of the digit.
    return aslant if len(aslant) > max(1, len(level)) else level


def _level_lines(mask: Mask, shortest: float | np.ndarray, thickest: float) -> list[Mask]:
    """The pixels of each line about level that is at least so many pixels long and this share of the mask thick.

    The length can be given for each height in the mask.
    """
    height, width = mask.shape
    # A slanting line is a staircase of runs; thickened a little, runs of a quarter of the width hold together.
    thick = cv2.dilate(mask, np.ones((round(0.02 * height) | 1, 1), np.uint8))
    runs = Parts(cv2.morphologyEx(thick, cv2.MORPH_OPEN, np.ones((1, max(3, width // 4)), np.uint8)) & mask)
    lines = []
    lengths = np.broadcast_to(shortest, height)
    for run in range(len(runs)):
        (wide, high), area = runs.size[run], runs.area[run]
        least = lengths[runs.start[run, 1] + high // 2]
        if wide >= least and high <= 0.25 * height and area <= thickest * height * wide:
            # Strokes that cross the line are taller than it is thick: they stay whole.
            line = runs.mask(run)
            thickness = line.sum(0)[line.any(0)]
            # The median: a bar that lies along the line is none of its thickness.
            side = int(1.7 * float(np.median(thickness))) + 3
            # Outside the image nothing is tall: by default OpenCV has what touches an edge go on there.
            stem = np.ones((side, 1), np.uint8)
            tall: Mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, stem, borderType=cv2.BORDER_CONSTANT, borderValue=0)
            lines.append(line & ~tall)
    return [line for line in lines if line.any()]
