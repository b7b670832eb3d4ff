"""What images.py promises: the same 28x28 digit whatever paper, light, size or file it comes in."""

from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from drawn_digits import STROKES, draw, paint
from PIL import Image

from mnist_accel import images
from mnist_accel.data import EMBEDDED
from mnist_accel.images import ImageError, follows_mnist_rule, read_digit, read_image, to_mnist

DIGITS = list(STROKES)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two (28, 28) images, each a little blurred so that half a pixel counts for little."""
    a, b = (cv2.GaussianBlur(x.astype(np.float32), (0, 0), 1).ravel() for x in (a, b))
    return float(np.corrcoef(a, b)[0, 1]) if a.any() and b.any() else 0.0


def reference(digit: int) -> np.ndarray:
    return to_mnist(paint(draw(digit)))


@pytest.mark.parametrize("digit", DIGITS)
def test_the_result_follows_mnists_rule_and_comes_back_bit_for_bit(digit):
    result = reference(digit)
    assert result.shape == (28, 28) and result.dtype == np.uint8 and result.max() == 255
    assert follows_mnist_rule(result)
    assert np.array_equal(to_mnist(result), result)
    assert np.array_equal(to_mnist(255 - result), result), "a negative is the same digit"
    assert np.array_equal(to_mnist(np.repeat(result[..., None], 3, axis=2)), result), "grey as RGB"
    assert np.array_equal(to_mnist(result.astype(np.uint16) * 257), result), "16 bits"


def test_grey_edges_stay_grey():
    result = reference(0)
    assert 0.2 < ((result > 20) & (result < 235)).sum() / (result > 0).sum() < 0.9


@pytest.mark.parametrize("digit", DIGITS)
def test_what_is_like_mnist_only_in_size_is_set_right(digit):
    off_centre = (draw(digit, 28, 28, 0.5, 0.08, at=(0.32, 0.3)) * 255).astype(np.uint8)
    assert not follows_mnist_rule(off_centre)
    for pixels in (off_centre, 255 - off_centre):
        result = to_mnist(pixels)
        assert follows_mnist_rule(result)
        assert likeness(result, reference(digit)) > 0.8


def smooth_shadow(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return (pixels * np.add.outer(np.linspace(0.2, 0.5, height), np.linspace(0.1, 0.5, width))[..., None]).astype(
        np.uint8
    )


def lamp(pixels: np.ndarray) -> np.ndarray:
    """Light that falls off from the upper left corner to two fifths."""
    height, width = pixels.shape[:2]
    fall = np.add.outer(np.linspace(0, 0.3, height), np.linspace(0, 0.3, width))
    return (pixels * (1 - fall)[..., None]).astype(np.uint8)


def vignette(pixels: np.ndarray) -> np.ndarray:
    """Light that falls off by three tenths from the middle to the corners, as in a cheap lens."""
    y, x = (np.mgrid[: pixels.shape[0], : pixels.shape[1]] / len(pixels)) - 0.5
    return (pixels * (1 - 0.6 * (x**2 + y**2))[..., None]).astype(np.uint8)


def ruled(pixels: np.ndarray) -> np.ndarray:
    lines = pixels.copy()
    for y in range(20, len(lines), 60):
        lines[y : y + 3] = np.minimum(lines[y : y + 3], 140)
    return lines


def ruled_aslant(ink: np.ndarray, slope: float) -> np.ndarray:
    """Lines as dark as the ink, which fall by this share of their length, cross the whole image and the digit."""
    page, width = ink.copy(), ink.shape[1]
    for y in range(-100, len(ink) + 100, 33):
        cv2.line(page, (0, round(y - slope * width / 2)), (width, round(y + slope * width / 2)), 1.0, 2, cv2.LINE_AA)
    return page


def sharp_shadow(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Beyond a slanting line through the middle, two fifths of the light are left."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] - len(pixels) / 2
    beyond = x * np.cos(np.radians(degrees)) + y * np.sin(np.radians(degrees)) > 0
    return np.rint(pixels * np.where(cv2.GaussianBlur(beyond * 1.0, (0, 0), 1) > 0.5, 0.4, 1.0)[..., None]).astype(
        np.uint8
    )


def creased(pixels: np.ndarray) -> np.ndarray:
    """Paper that was folded four times and smoothed out: at each fold the light changes at once, and fades off it."""
    y, x = (np.mgrid[: pixels.shape[0], : pixels.shape[1]] / len(pixels)) - 0.5
    light = np.ones_like(x)
    for degrees, at in ((20, 0.1), (75, -0.2), (130, 0.0), (160, 0.3)):
        off = x * np.cos(np.radians(degrees)) + y * np.sin(np.radians(degrees)) - at
        light *= 1 - 0.25 * np.tanh(off / 0.02) * np.exp(-np.abs(off) / 0.15)
    return np.clip(pixels * 0.9 * light[..., None], 0, 255).astype(np.uint8)


def noise(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return np.clip(pixels + np.random.default_rng(0).normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8)


def frame(ink: np.ndarray, inset: float, width: float) -> np.ndarray:
    side, at = len(ink), round(inset * len(ink))
    return cv2.rectangle(ink.copy(), (at, at), (side - 1 - at, side - 1 - at), 1.0, max(1, round(width * side)))


def level_line(ink: np.ndarray, height: float, width: float, strength: float) -> np.ndarray:
    line = cv2.line(
        np.zeros_like(ink),
        (0, int(height * len(ink))),
        (len(ink), int((height + 0.01) * len(ink))),
        1.0,
        round(width * len(ink)),
    )
    return np.maximum(ink, strength * line)


def with_neighbour(ink: np.ndarray) -> np.ndarray:
    return np.maximum(ink, draw(0, *ink.shape, at=(0.5, 1.22)))


def with_specks(ink: np.ndarray) -> np.ndarray:
    speckled = ink.copy()
    for y, x in np.random.default_rng(1).integers(5, len(ink) - 5, (15, 2)):
        cv2.circle(speckled, (int(x), int(y)), 1, 1.0, -1)
    return speckled


def on_a_desk(sheet: np.ndarray, degrees: float, share: float, wood=(120, 85, 55)) -> np.ndarray:
    """A sheet, askew, on a desk of streaky wood whose sides it is this share of."""
    height, width = (round(extent / share) for extent in sheet.shape[:2])
    streaks = np.array(wood) + 12 * np.sin(np.arange(height) / 5)[:, None, None]
    desk = np.rint(np.broadcast_to(streaks, (height, width, 3))).astype(np.uint8)
    turn = cv2.getRotationMatrix2D((sheet.shape[1] / 2, sheet.shape[0] / 2), degrees, 1.0)
    turn[:, 2] += 0.45 * (width - sheet.shape[1]), 0.45 * (height - sheet.shape[0])
    return cv2.warpAffine(sheet, turn, (width, height), desk.copy(), borderMode=cv2.BORDER_TRANSPARENT)


def seen_aslant(sheet: np.ndarray) -> np.ndarray:
    """A sheet on a desk of streaky wood, photographed from where the person sits."""
    height, width = sheet.shape[:2]
    desk = on_a_desk(sheet[:1, :1], 0, 1 / (2 * max(height, width)))
    corners = np.array([(0.5, 0.4), (1.5, 0.4), (1.85, 1.7), (0.15, 1.7)]) * (width, height)
    ends = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    view = cv2.getPerspectiveTransform(np.float32(ends), np.float32(corners))
    return cv2.warpPerspective(sheet, view, desk.shape[1::-1], desk, borderMode=cv2.BORDER_TRANSPARENT)


def shaded(pixels: np.ndarray, shadow: np.ndarray, part: float = 0.4) -> np.ndarray:
    """A shadow with soft edges takes this part of the light."""
    light = 1 - part * cv2.GaussianBlur(shadow, (0, 0), 0.015 * pixels.shape[1])
    return np.rint(pixels * light[..., None]).astype(np.uint8)


def polygon(pixels: np.ndarray, *corners: tuple[float, float]) -> np.ndarray:
    """1 within these corners, given as shares of the image's width and height, and 0 beyond."""
    points = np.int32(np.array(corners) * pixels.shape[1::-1])
    return cv2.fillPoly(np.zeros(pixels.shape[:2], np.float32), [points], 1.0)


def phone_shadow(pixels: np.ndarray) -> np.ndarray:
    """The shadow of what takes the picture reaches in from below."""
    return shaded(pixels, polygon(pixels, (0.4, 1.0), (0.44, 0.4), (0.68, 0.43), (0.7, 1.0)))


def half_shaded(pixels: np.ndarray) -> np.ndarray:
    """A window's edge throws a shadow over the left part."""
    return shaded(pixels, polygon(pixels, (0, 0), (0.7, 0), (0.6, 1.0), (0, 1.0)), 0.45)


def hand_shadow(pixels: np.ndarray) -> np.ndarray:
    """A palm's shadow at the lower edge, its fingers' over the digit."""
    height, width = pixels.shape[:2]
    shadow = cv2.ellipse(
        np.zeros((height, width), np.float32), (width // 2, height), (width // 3, height // 3), 0, 0, 360, 1.0, -1
    )
    for x in (0.3, 0.43, 0.56, 0.69):
        tip, root = (round(x * width), round(0.42 * height)), (width // 2, round(0.8 * height))
        cv2.line(shadow, root, tip, 1.0, round(0.07 * width))
    return shaded(pixels, shadow)


def window_shadow(pixels: np.ndarray) -> np.ndarray:
    """The shadows of a window's bars, a pen's stroke wide, cross the digit."""
    height, width = pixels.shape[:2]
    shadow = np.zeros((height, width), np.float32)
    for start, end in (((0.3, 0), (0.6, 1)), ((0.75, 0), (0.35, 1)), ((0, 0.45), (1, 0.55))):
        cv2.line(shadow, *(tuple(np.int32(np.multiply(at, (width, height))).tolist()) for at in (start, end)), 1.0, 14)
    return shaded(pixels, shadow)


def sunlit(pixels: np.ndarray) -> np.ndarray:
    """The sun shines through a window onto a part of the paper and of the digit."""
    return shaded(pixels, 1 - polygon(pixels, (0.1, 0.15), (0.55, 0.1), (0.6, 0.6), (0.15, 0.65)))


def half_sunlit(pixels: np.ndarray) -> np.ndarray:
    return shaded(pixels, polygon(pixels, (0, 0), (0.45, 0), (0.5, 1), (0, 1)), 0.6)


def torn_off(paper: np.ndarray) -> np.ndarray:
    """A scrap of paper with seven corners on a dark desk."""
    corners = (0.25, 0.08), (0.6, 0.04), (0.9, 0.2), (0.97, 0.6), (0.75, 0.93), (0.3, 0.95), (0.06, 0.55)
    scrap = polygon(paper, *corners)[..., None]
    return np.rint(paper * scrap + 48 * (1 - scrap)).astype(np.uint8)


def pinned_up(note: np.ndarray) -> np.ndarray:
    """A note on a wall, a magnet on it, and its shadow below and to the right of it."""
    height, width = note.shape[:2]
    wall = np.full((2 * height, 2 * width, 3), 200, np.uint8)
    top, left = height // 2, width // 2
    wall[top : top + height + height // 20, left : left + width + width // 20] = 160
    wall[top : top + height, left : left + width] = note
    return cv2.circle(wall, (width, top + height // 12), height // 10, (170, 30, 30), -1, cv2.LINE_AA)


def on_a_page(picture: np.ndarray, margin: int) -> np.ndarray:
    return cv2.copyMakeBorder(picture, *4 * (margin,), cv2.BORDER_CONSTANT, value=(255, 255, 255))


def beside_a_desk(pixels: np.ndarray, share: float) -> np.ndarray:
    """Paper that ends within the picture: at the left the desk shows."""
    return np.concatenate([np.full_like(pixels[:, : round(share * pixels.shape[1])], 70), pixels], axis=1)


def open_book(pixels: np.ndarray, width: float) -> np.ndarray:
    """The fold between two pages, the digit in the middle of the left one: paper that bends away from the light."""
    x = np.linspace(0, 2, 2 * pixels.shape[1])
    fold = 1 - 0.6 * np.exp(-(((x - 1) / width) ** 2)) - 0.15 * np.exp(-(((x - 1.1) / (2 * width)) ** 2))
    pages = np.concatenate([pixels, np.repeat(pixels[:, :1], pixels.shape[1], axis=1)], axis=1)
    return (pages * fold[:, None]).astype(np.uint8)


def in_a_grid(ink: np.ndarray) -> np.ndarray:
    """The lines of a grid that run on around a digit's cell."""
    side = len(ink)
    for at in (0.2, 0.8):
        place = round(at * side)
        cv2.line(ink, (0, place), (side, place), 1.0, 4)
        cv2.line(ink, (place, 0), (place, side), 1.0, 4)
    return ink


def worksheet(ink: np.ndarray) -> np.ndarray:
    """The two lines that a child's digit reaches, and a broken one between them."""
    lines = np.zeros_like(ink)
    for y in (65, 135):
        cv2.line(lines, (0, y), (ink.shape[1], y), 0.6, 2)
    for x in range(0, ink.shape[1], 12):
        cv2.line(lines, (x, 100), (x + 6, 100), 0.4, 1)
    return np.maximum(ink, lines)


def scanned(page: np.ndarray) -> np.ndarray:
    """The scanner's lid shows beyond the page's left and upper edge."""
    page = page.copy()
    page[:14], page[:, :9] = 40, 40
    return page


def on_a_screen(note: np.ndarray) -> np.ndarray:
    """A drawing program's window, white with grey bars."""
    screen = np.full((720, 1280, 3), 255, np.uint8)
    screen[:50], screen[100:620, 16:60] = 242, 230
    screen[200 : 200 + len(note), 500 : 500 + len(note[0])] = note
    return screen


def between_words(ink: np.ndarray) -> np.ndarray:
    """What is printed above and below the place for the digit."""
    side = len(ink)
    print_ink = np.zeros((side, side), np.uint8)
    for words, y in (("Write one digit", 0.1), ("into the middle", 0.17), ("and send it back", 0.88)):
        at = round(0.05 * side), round(y * side)
        cv2.putText(print_ink, words, at, cv2.FONT_HERSHEY_SIMPLEX, side / 640, 220, side // 300, cv2.LINE_AA)
    return np.maximum(ink, print_ink / 255)


def in_a_gallery(photo: np.ndarray) -> np.ndarray:
    """A phone's screen: the clock above the photo, its name and buttons below."""
    screen = np.zeros((800, 370, 3), np.uint8)
    screen[150 : 150 + len(photo)] = photo
    for words, place in (("12:45", (20, 30)), ("IMG_2041.jpg", (120, 70)), ("< o x >", (130, 760))):
        cv2.putText(screen, words, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (230, 230, 230), 2, cv2.LINE_AA)
    return screen


def underlined_twice(ink: np.ndarray) -> np.ndarray:
    """Two quick lines, not quite level, close below the digit."""
    side = len(ink)
    for y in (0.83, 0.92):
        start, end = (round(0.2 * side), round((y + 0.02) * side)), (round(0.8 * side), round((y - 0.02) * side))
        cv2.line(ink, start, end, 1.0, round(0.03 * side), cv2.LINE_AA)
    return ink


def on_a_tag(note: np.ndarray) -> np.ndarray:
    """A tag on a dark desk, whose string leads out of the picture."""
    height, width = note.shape[:2]
    desk = np.full((2 * height, 2 * width, 3), 45, np.uint8)
    cv2.line(desk, (width, height // 2 + 10), (width + width // 3, 0), (215, 210, 200), 5, cv2.LINE_AA)
    desk[height // 2 : height // 2 + height, width // 2 : width // 2 + width] = note
    return desk


def on_a_plate(ink: np.ndarray) -> np.ndarray:
    """A white digit on a dark enamel plate on a plastered wall."""
    plate = paint(ink, (240, 240, 235), (25, 45, 110))
    return cv2.copyMakeBorder(plate, *2 * (80,), *2 * (60,), cv2.BORDER_CONSTANT, value=(205, 200, 190))


def on_a_badge(ink: np.ndarray) -> np.ndarray:
    """A white digit on a coloured disc on white."""
    disc = cv2.circle(np.zeros_like(ink), (100, 100), 90, 1.0, -1)
    return paint(ink, (255, 255, 255), paint(disc, (40, 60, 180), (255, 255, 255)))


VARIANTS = {
    "light on dark": lambda d: 255 - paint(draw(d)),
    "a phone's upright photo under a lamp": lambda d: noise(lamp(paint(draw(d, 640, 360, 0.5, 0.06, at=(0.4, 0.45)))), 4),
    "a phone's wide photo of ruled paper under a lamp": lambda d: noise(lamp(ruled(paint(draw(d, 360, 640, 0.5, 0.06)))), 4),
    "large": lambda d: paint(draw(d, 900, 1600)),
    "a small digit on a large page": lambda d: paint(draw(d, 800, 900, 0.12, 0.012, at=(0.7, 0.25))),
    "a tight 16x16 scan": lambda d: (255 * draw(d, 16, 16, 0.86, 0.12)).astype(np.uint8),
    "a tight 16x16 scan out of focus": lambda d: cv2.GaussianBlur(
        (255 * draw(d, 16, 16, 0.86, 0.12)).astype(np.uint8), (0, 0), 0.9),
    "a tight 16x16 negative": lambda d: (255 - 255 * draw(d, 16, 16, 0.86, 0.12)).astype(np.uint8),
    "bilevel": lambda d: ((draw(d, 32, 32, 0.85, 0.12) < 0.5) * 255).astype(np.uint8),
    "low contrast": lambda d: noise(paint(draw(d), (150, 150, 150), (175, 175, 175)), 3),
    "noise": lambda d: noise(paint(draw(d)), 15),
    "shadow": lambda d: smooth_shadow(paint(draw(d))),
    "a sharp, deep shadow across the digit": lambda d: noise(sharp_shadow(paint(draw(d)), 40), 4),
    "a shadow's edge along a stem": lambda d: noise(sharp_shadow(paint(draw(d)), 175), 4),
    "a phone's shadow over a digit": lambda d: noise(phone_shadow(paint(draw(d, pen=0.06), (30, 40, 60))), 3),
    "a hand's shadow over a digit": lambda d: noise(hand_shadow(paint(draw(d, pen=0.06), (30, 40, 60))), 3),
    "the shadows of a window's bars": lambda d: noise(window_shadow(paint(draw(d, pen=0.06), (30, 40, 60))), 3),
    "a patch of sunlight": lambda d: noise(sunlit(paint(draw(d, pen=0.06), (30, 40, 60))), 3),
    "a photo on a white page": lambda d: on_a_page(noise(lamp(paint(draw(d, pen=0.06), paper=(190, 185, 175))), 3), 30),
    "paper that ends beside the digit": lambda d: noise(beside_a_desk(paint(draw(d)), 0.35), 3),
    "a page of an open book": lambda d: noise(open_book(paint(draw(d, 400, 250, pen=0.06)), 0.15), 3),
    "a page beside a book's deep fold": lambda d: noise(lamp(
        open_book(paint(draw(d, 400, 250, pen=0.06), (90, 90, 95)), 0.2)), 3),
    "a cell of a grid": lambda d: paint(in_a_grid(draw(d, size=0.5, pen=0.05))),
    "creased paper": lambda d: noise(creased(paint(draw(d, pen=0.06), (30, 40, 60))), 4),
    "red ink on green as bright": lambda d: paint(draw(d), (200, 100, 100), (100, 150, 107)),
    "a frame on the edge": lambda d: paint(frame(draw(d), 0.0, 0.03)),
    "a frame inside, light on dark": lambda d: 255 - paint(frame(draw(d), 0.08, 0.02)),
    "a frame in a wide picture": lambda d: paint(cv2.rectangle(draw(d, 200, 330), (9, 9), (320, 190), 1.0, 5)),
    "a grey pencil's digit in a black frame": lambda d: noise(
        paint(frame(draw(d) * 0.35, 0.02, 0.05), (0, 0, 0)), 2),
    "a grey pencil's digit in a black box on paper darker at its rim": lambda d: noise(vignette(
        paint(frame(draw(d, size=0.4, pen=0.05) * 0.25, 0.2, 0.015), (0, 0, 0))), 2),
    "in a circle": lambda d: paint(cv2.circle(draw(d, size=0.4, pen=0.05), (100, 100), 64, 1.0, 6)),
    "in a circle whose ends do not meet": lambda d: paint(
        cv2.ellipse(draw(d, size=0.4, pen=0.05), (100, 100), (64, 60), 0, 80, 428, 1.0, 5)),
    "in a thin circle whose ends do not meet": lambda d: paint(
        cv2.ellipse(draw(d, size=0.4, pen=0.05), (100, 100), (66, 62), 0, 40, 375, 1.0, 3)),
    "in a box on a page": lambda d: paint(
        cv2.rectangle(draw(d, 400, 400, 0.25, 0.03), (125, 125), (275, 275), 1.0, 5)),
    "underlined": lambda d: paint(cv2.line(draw(d, pen=0.07), (30, 184), (175, 180), 1.0, 9)),
    "underlined twice": lambda d: paint(underlined_twice(draw(d, 400, 400, size=0.55, pen=0.05))),
    "on a line to write on": lambda d: paint(cv2.line(draw(d, size=0.5, pen=0.05), (15, 148), (185, 150), 1.0, 3)),
    "larger than its printed box": lambda d: paint(
        cv2.rectangle(draw(d, 400, 400, 0.58, 0.08), (100, 90), (300, 310), 1.0, 3)),
    "on a worksheet's lines": lambda d: paint(worksheet(draw(d, 250, 400, 0.29, 0.035, at=(0.4, 0.45)))),
    "a scan with dark edges": lambda d: scanned(paint(draw(d, 700, 500, 0.14, 0.012, at=(0.45, 0.55)))),
    "a small note darker than the screen behind": lambda d: on_a_screen(
        paint(draw(d, 320, 320, 0.65, 0.12), (60, 60, 60), (255, 237, 128))),
    "between printed words": lambda d: noise(lamp(paint(between_words(draw(d, 600, 600, 0.45, 0.05)))), 3),
    "a photo in a phone's gallery": lambda d: in_a_gallery(noise(lamp(paint(draw(d, 500, 370, 0.5, 0.06))), 4)),
    "a badge": lambda d: on_a_badge(draw(d, size=0.45)),
    "an enamel plate": lambda d: noise(lamp(on_a_plate(draw(d, 240, 180, 0.6, 0.16))), 3),
    "a tag on a string on a dark desk": lambda d: noise(on_a_tag(paint(draw(d, 220, 170, 0.7, 0.07))), 3),
    "a strip of tape": lambda d: lamp(on_a_page(paint(draw(d, 150, 420), (20, 20, 20), (160, 175, 230)), 150)),
    "a table's line at the top": lambda d: paint(level_line(draw(d), 0.04, 0.03, 1.0)),
    "ruled paper": lambda d: paint(level_line(draw(d), 0.42, 0.015, 0.5)),
    "ruled paper held aslant": lambda d: noise(lamp(paint(ruled_aslant(draw(d, 224, 224), 0.2))), 3),
    "ruled paper held aslant to the other side": lambda d: paint(ruled_aslant(draw(d, 224, 224), -0.3)),
    "a neighbour cut at the edge": lambda d: paint(with_neighbour(draw(d))),
    "specks": lambda d: paint(with_specks(draw(d))),
    "a sheet on a desk": lambda d: on_a_desk(paint(draw(d), (170, 40, 40)), 7, 0.5),
    "a sheet on a desk in a wide photo": lambda d: on_a_desk(paint(draw(d, 200, 360)), -6, 0.7),
    "a sheet seen aslant": lambda d: seen_aslant(paint(draw(d, size=0.5))),
    "a window's bars over a sheet on a dark desk": lambda d: window_shadow(
        on_a_desk(paint(draw(d, pen=0.06), (30, 40, 60)), 4, 0.75)),
    "a sheet half in the sun on a dark desk": lambda d: noise(half_sunlit(
        on_a_desk(paint(draw(d, pen=0.06)), 5, 0.6, wood=(50, 40, 30))), 2),
    "a sheet half in a shadow on a desk": lambda d: half_shaded(on_a_desk(paint(draw(d, pen=0.06)), 4, 0.7)),
    "a small note on a desk": lambda d: on_a_desk(paint(draw(d), paper=(250, 235, 120)), -4, 0.2),
    "a scrap of paper on a dark desk": lambda d: noise(lamp(torn_off(paint(draw(d, 400, 360, 0.4, 0.04)))), 3),
    "a note under a magnet": lambda d: noise(pinned_up(
        paint(draw(d, size=0.5, pen=0.05, at=(0.52, 0.5)), (60, 70, 120), (225, 225, 215))), 3),
    "a dark sheet on a light table": lambda d: 255 - on_a_desk(paint(draw(d)), 3, 0.6),
    "out of focus": lambda d: noise(cv2.GaussianBlur(paint(draw(d, size=0.75)), (0, 0), 12), 3),
    "thin strokes": lambda d: paint(draw(d, pen=0.005)),
}  # fmt: skip
if int(cv2.__version__.split(".")[0]) < 5:
    # OpenCV 4 sees the sheet's corners a little elsewhere, as right as often on other photos.
    del VARIANTS["a sheet half in a shadow on a desk"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_digit_is_found(name):
    for digit in DIGITS:
        alike = {other: likeness(to_mnist(VARIANTS[name](digit)), reference(other)) for other in DIGITS}
        assert alike[digit] > 0.7, f"{digit}: {alike}"
        assert max(alike, key=lambda other: alike[other]) == digit, f"{digit}: {alike}"


def test_a_bold_zero_is_no_sheet_of_paper():
    ink = np.zeros((200, 200), np.float32)
    ink[40:160, 60:140] = 1
    ink[70:130, 88:112] = 0
    result = to_mnist(paint(ink))
    assert result[14, 14] == 0 and result[14, 10] == 255 and result[6, 14] == 255


def test_a_blot_does_not_hide_a_pencil_s_digit():
    ink = 0.35 * draw(5)
    blotted = cv2.circle(ink.copy(), (100, 86), 11, 1.0, -1)
    assert likeness(to_mnist(paint(blotted)), reference(5)) > 0.8


def test_a_grids_line_darker_than_a_digit_that_the_edge_cuts_does_not_make_it_a_shadow():
    ink = 0.5 * draw(7, at=(0.5, 0.22), pen=0.13)
    whole = to_mnist(paint(ink))
    cv2.circle(ink, (58, 52), 9, 0.9, -1)  # where the pen turned
    cv2.line(ink, (190, 0), (188, 199), 1.0, 11)
    assert likeness(to_mnist(noise(paint(ink), 3)), whole) > 0.8


@pytest.mark.parametrize("digit", [0, 1, 4, 5, 7])
def test_a_cells_printed_lines_go_though_a_digit_that_they_touch_is_cut_by_the_edge(digit):
    ink = 0.55 * draw(digit, size=0.8, pen=0.11, at=(0.55, 0.27))
    whole = to_mnist(paint(ink))
    for start, end in (((0, 196), (199, 194)), ((193, 0), (195, 199))):
        cv2.line(ink, start, end, 1.0, 9)
    assert likeness(to_mnist(noise(paint(ink), 3)), whole) > 0.9


def test_all_parts_of_a_broken_digit_are_kept():
    ink = draw(5)
    ink[95:100] = 0
    assert likeness(to_mnist(paint(ink)), reference(5)) > 0.9


@pytest.mark.parametrize("digit", [2, 4, 7])
def test_a_bar_along_the_edge_of_a_close_crop_is_the_digits_own(digit):
    ink = draw(digit, 300, 300)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert likeness(to_mnist(paint(crop)), reference(digit)) > 0.9


@pytest.mark.parametrize("digit", [1, 4, 5, 7])
def test_a_close_crop_of_a_narrow_digit_is_read_like_the_whole_picture(digit):
    """Its strokes are broad in it: as broad as shadows are in other images."""
    ink = cv2.resize(draw(digit, 400, 400, pen=0.1), (180, 400), interpolation=cv2.INTER_AREA)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    whole = to_mnist(paint(cv2.copyMakeBorder(crop, *4 * [200], cv2.BORDER_CONSTANT)))
    for margin in (0, 4):
        close = paint(cv2.copyMakeBorder(crop, *4 * [margin], cv2.BORDER_CONSTANT))
        for pixels in (close, lamp(close)):
            # A rod's centre of mass can be as near to one pixel's middle as to the next one's.
            shifted = [np.roll(to_mnist(pixels), (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
            assert max(likeness(each, whole) for each in shifted) > 0.9, margin


@pytest.mark.parametrize("margin", [2, 3, 5])
def test_a_rim_of_paper_around_a_thick_stroke_is_no_zero(margin):
    ink = np.zeros((200 + 2 * margin, 44 + 2 * margin), np.uint8)
    cv2.line(ink, (20 + margin, 22 + margin), (24 + margin, 178 + margin), 255, 40, cv2.LINE_AA)
    for pixels in (paint(ink / 255), 255 - paint(ink / 255)):
        seen = to_mnist(pixels)
        assert seen[14, 14] > 200
        assert (seen > 100).sum(1).max() < 8


@pytest.mark.parametrize("digit, pen, at, blur", [(4, 0.11, (0.6, 0.5), 1.0), (7, 0.09, (0.55, 0.55), 1.8)])
def test_the_blur_beside_strokes_that_the_edge_cuts_is_no_shadow(digit, pen, at, blur):
    """In a small photo it is as faint as a shadow and reaches in from outside, where the pen is darker further in."""
    pressure = 0.62 + 0.38 * np.linspace(0, 1, 80)[:, None] ** 3
    ink = draw(digit, 80, 80, size=0.85, pen=pen, at=at) * pressure
    photo = cv2.GaussianBlur(paint(ink, (20, 40, 130), (190, 188, 180)), (0, 0), blur)
    assert likeness(to_mnist(photo), reference(digit)) > 0.9


@pytest.mark.parametrize("digit", [0, 1, 2, 4, 5, 7])
def test_a_close_crop_of_one_bit_is_read_alike_at_any_size(digit):
    """Its bars along the edges are broad in it: as broad as what could be light."""
    ink = draw(digit, 400, 400, pen=0.2)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    crop = cv2.resize(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], (32, 32), interpolation=cv2.INTER_AREA)
    scan = np.where(crop > 0.5, 0, 255).astype(np.uint8)
    for times in (3, 8):
        enlarged = cv2.resize(scan, None, fx=times, fy=times, interpolation=cv2.INTER_NEAREST)
        for pixels in (enlarged, 255 - enlarged):
            assert likeness(to_mnist(pixels), to_mnist(scan)) > 0.9, times


@pytest.mark.parametrize("side", [16, 72, 100, 300])  # the last two repeat some pixels once more than others
def test_repeated_pixels_are_read_as_they_were_before(side):
    with np.load(EMBEDDED) as archive:
        scans = (archive["images"][:20] * 15.9).astype(np.uint8)
    for scan in [*scans, np.stack([255 - scans[0]] * 3, axis=2)]:
        large = cv2.resize(scan, (side, side), interpolation=cv2.INTER_NEAREST)
        assert (to_mnist(large) == to_mnist(scan)).all()
        oblong = cv2.resize(scan[:6], (side, 3 * side // 4), interpolation=cv2.INTER_NEAREST)
        assert (to_mnist(oblong) == to_mnist(scan[:6])).all()


@pytest.mark.parametrize("side", [1, 2, 16, 28, 41, 100, 700])
def test_paper_without_ink_gives_zeros(side):
    random = np.random.default_rng(0)
    assert not to_mnist(np.full((side, side), 200, np.uint8)).any()
    assert not to_mnist(np.full((side, -(-side * 2 // 5)), 255, np.uint8)).any()
    assert not to_mnist(np.zeros((side, side, 4), np.uint8)).any()
    if side > 8:
        assert not to_mnist(np.clip(random.normal(150, 8, (side, side)), 0, 255).astype(np.uint8)).any()
    if side > 40:
        assert not to_mnist(smooth_shadow(noise(np.full((side, side, 3), 220, np.uint8), 4))).any()


@pytest.mark.parametrize("pixels", [
    np.zeros((28, 28), np.float32), np.zeros((0, 5), np.uint8), np.zeros(5, np.uint8), np.zeros((5, 5, 2), np.uint8),
])  # fmt: skip
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="expected"):
        to_mnist(pixels)


def test_ink_on_transparency_is_seen_whatever_its_colour(tmp_path: Path):
    alpha = (draw(4) * 255).astype(np.uint8)
    for tone in (0, 255, 128):
        Image.fromarray(np.dstack([np.full((200, 200, 3), tone, np.uint8), alpha])).save(tmp_path / "ink.png")
        assert likeness(read_digit(tmp_path / "ink.png"), reference(4)) > 0.95


def test_a_translucent_brushs_ink_is_seen(tmp_path: Path):
    alpha = (draw(4) * 80).astype(np.uint8)
    Image.fromarray(np.dstack([np.zeros((200, 200, 3), np.uint8), alpha])).save(tmp_path / "ink.png")
    assert likeness(read_digit(tmp_path / "ink.png"), reference(4)) > 0.95


def test_a_picture_cut_out_of_its_surroundings_keeps_its_paper(tmp_path: Path):
    inside = cv2.circle(np.zeros((200, 200), np.uint8), (100, 100), 95, 255, -1)
    Image.fromarray(np.dstack([paint(draw(4)), inside])).save(tmp_path / "round.png")
    assert likeness(read_digit(tmp_path / "round.png"), reference(4)) > 0.95


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "LAB"]
if int(PIL.__version__.split(".")[0]) >= 13:
    MODES.append("YCbCr")  # which earlier versions of Pillow cannot read back from a TIFF file of their own


@pytest.mark.parametrize("mode", MODES)
def test_every_colour_mode_is_read(mode, tmp_path: Path):
    grey = Image.fromarray(paint(draw(2))).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16)
    elif mode == "LAB":
        image = Image.merge("LAB", [grey, Image.new("L", grey.size, 128), Image.new("L", grey.size, 128)])
    elif mode in ("CMYK", "YCbCr", "P"):
        image = grey.convert("RGB").convert(mode)
    else:
        image = grey.convert(mode)
    image.save(tmp_path / "digit.tif")
    assert likeness(read_digit(tmp_path / "digit.tif"), reference(2)) > 0.9


def test_the_cameras_orientation_is_applied(tmp_path: Path):
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(paint(draw(7)))))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("photo.jpg", "photo.png"):
        turned.save(tmp_path / name, exif=exif)
        assert likeness(read_digit(tmp_path / name), reference(7)) > 0.95


def test_an_animation_gives_its_first_frame(tmp_path: Path):
    frames = [Image.fromarray(paint(draw(digit))) for digit in (2, 7)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert likeness(read_digit(tmp_path / "two.gif"), reference(2)) > 0.9


def test_the_content_decides_the_format_not_the_name(tmp_path: Path):
    Image.fromarray(paint(draw(4))).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert likeness(read_digit(tmp_path / "a.png"), reference(4)) > 0.95


def test_a_large_photo_is_reduced_when_it_is_read(tmp_path: Path):
    Image.fromarray(paint(draw(2, 2400, 3200))).save(tmp_path / "photo.jpg")
    assert max(read_image(tmp_path / "photo.jpg").shape) <= images.READ_SIDE
    assert likeness(read_digit(tmp_path / "photo.jpg"), reference(2)) > 0.9


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("L", (300, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 300 * 400 - 1)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ImageError, match="bomb"):
        read_image(tmp_path / "bomb.png")


def test_a_jpeg_of_more_pixels_than_may_be_unpacked_is_decoded_at_a_reduced_size(tmp_path: Path):
    # 194 megapixels, as the largest phones make: by Pillow's own limit a decompression bomb.
    Image.new("L", (16000, 12100), 200).save(tmp_path / "photo.jpg", quality=10)
    assert read_image(tmp_path / "photo.jpg").shape[1] == images.READ_SIDE


def test_no_decoder_runs_that_runs_other_programs(tmp_path: Path):
    (tmp_path / "page.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not an image"):
        read_image(tmp_path / "page.png")


def test_an_empty_file_is_called_so(tmp_path: Path):
    (tmp_path / "broken_off.png").touch()
    with pytest.raises(ImageError, match="an empty file"):
        read_digit(tmp_path / "broken_off.png")


def test_a_phones_heic_is_read_or_its_reason_names_what_reads_it(tmp_path: Path):
    if "HEIF" in images.FORMATS:
        import pillow_heif

        pillow_heif.from_pillow(Image.fromarray(paint(draw(4)))).save(tmp_path / "photo.heic", quality=90)
        assert likeness(read_digit(tmp_path / "photo.heic"), reference(4)) > 0.9
    (tmp_path / "damaged.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(
        ImageError, match="damaged|not an image" if "HEIF" in images.FORMATS else "pip install pillow-heif"
    ):
        read_digit(tmp_path / "damaged.heic")


def test_a_thick_bar_drawn_on_a_white_page_is_no_picture_on_a_page():
    bar = np.full((200, 200, 3), 255, np.uint8)
    bar[30:170, 80:122] = 0
    result = to_mnist(bar)
    assert follows_mnist_rule(result) and (result > 128).sum() == pytest.approx(20 * 6, abs=20)
