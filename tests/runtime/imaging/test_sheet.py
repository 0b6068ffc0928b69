"""Contact sheets: where pictures and labels stand, and which sheets are refused."""

import numpy as np
import pytest
from PIL import Image

from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.sheet import GAP, Sheet


def picture(width=64, height=48, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def contact_sheet(pictures, **options):
    cell = (max((p.width for p in pictures), default=0), max((p.height for p in pictures), default=0))
    sheet = Sheet(len(pictures), cell, **options)
    for index, image in reversed(list(enumerate(pictures))):  # in any order
        sheet.place(index, image)
    return sheet.picture


def test_contact_sheet_places_pictures_row_by_row():
    pictures = [picture(8, 6, seed) for seed in range(5)]
    sheet = np.asarray(contact_sheet(pictures, columns=3, upscale=2))
    assert sheet.shape == (2 * (12 + GAP) + GAP, 3 * (16 + GAP) + GAP, 3)
    for index, image in enumerate(pictures):
        top, left = GAP + index // 3 * (12 + GAP), GAP + index % 3 * (16 + GAP)
        nearest = np.asarray(image).repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(sheet[top : top + 12, left : left + 16], nearest)
    assert (sheet[12 + 2 * GAP :, 2 * (16 + GAP) + GAP :] == 255).all()


def test_contact_sheet_mixes_sizes_and_modes():
    sheet = contact_sheet([picture(8, 8), picture(20, 4).convert("L"), picture(4, 20).convert("RGBA")])
    assert sheet.size == (2 * (20 + GAP) + GAP, 2 * (20 + GAP) + GAP)
    assert sheet.mode == "RGB"


LABELS = {
    "short": "cat",
    "long words": "supercalifragilistic " * 5,
    "long": "a photo of a cat " * 1000,
    "no letter fits the font": "猫🙂\ud800\n\t",
    "empty": "",
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_labels_stay_in_their_column(label):
    white = Image.new("RGB", (60, 10), "white")
    sheet = np.asarray(contact_sheet([white, white, white], columns=3, labels=["", label, ""]))
    column = 60 + GAP
    outside = np.delete(sheet, np.s_[GAP + column : GAP + column + 60], axis=1)
    assert (outside == 255).all()
    inked = (sheet[:, GAP + column : GAP + column + 60] < 128).any()
    assert inked == bool(label)


def test_labels_are_below_their_picture():
    white = Image.new("RGB", (60, 10), "white")
    sheet = np.asarray(contact_sheet([white], labels=["gjpqy gjpqy gjpqy gjpqy gjpqy"]))
    assert (sheet[: GAP + 10] == 255).all()
    assert (sheet[-1] == 255).all()


SHEETS = {
    "no picture": ([], {}, "at least one"),
    "labels": ([picture()], {"labels": ["a", "b"]}, "2 labels for 1 pictures"),
    "columns": ([picture()], {"columns": 0}, "1 or more"),
    "upscale": ([picture()], {"upscale": 0}, "1 or more"),
    "size": ([picture()], {"upscale": 1000}, "at most 80000000 pixels"),
}


@pytest.mark.parametrize(("pictures", "options", "reason"), SHEETS.values(), ids=SHEETS)
def test_refused_sheets(pictures, options, reason):
    with pytest.raises(RequestError, match=reason):
        contact_sheet(pictures, **options)
