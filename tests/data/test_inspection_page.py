"""The page and the text: what the model sees, whole and escaped, from one file that needs nothing else."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import noise, one_subset
from PIL import Image

from library.data.inspection.contact_sheet import contact_sheets
from library.data.inspection.findings import Report, finding
from library.data.inspection.report_html import report_html
from library.data.inspection.report_text import WIDTH, amount, duration, report_text, shortened
from library.data.inspection.survey import survey
from library.data.inspection.writing import ending_problem, write_report
from library.data.order import Sample

VOID = {"meta", "img", "br", "link"}
BUCKETED = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\nbatch_size = 4"


class Page(HTMLParser):
    """The tags, attributes and text of a page; fails where tags do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(data, samples: int = 24) -> Page:
    return Page(report_html(survey(data, []), contact_sheets(data, samples), "title"))


def pixels(jpeg: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg))), dtype=np.float64)


def test_a_page_is_whole_and_refers_to_nothing_outside(make_folder, build):
    page = page_of(build(one_subset(make_folder(sizes=[(64, 64)] * 3 + [(32, 128)] * 2), BUCKETED)))
    assert len(page.all("figure")) == 5
    assert all(each["src"].startswith("data:image/jpeg;base64,") for each in page.all("img"))
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"] for link in page.all("a")} == {f"#{anchor}" for anchor in anchors} == {"#training-1-32x128", "#training-1-64x64"}
    assert "default-src 'none'" in next(each["content"] for each in page.all("meta") if "http-equiv" in each)


def test_captions_and_names_are_escaped(make_folder, build):
    folder = make_folder(sizes=[(64, 64)])
    (folder / "000.png").rename(folder / "<b>&'\"x.png")
    (folder / "000.txt").rename(folder / "<b>&'\"x.txt")
    evil = "</figcaption><script>alert('x')</script> \"quoted\" & <img src=x onerror=y>"
    (folder / "<b>&'\"x.txt").write_text(evil)
    page = page_of(build(one_subset(folder)))
    assert len(page.all("img")) == 1 and not page.all("script") and not page.all("b")
    assert page.all("img")[0]["title"] == evil and evil in page.text


def test_a_sheet_shows_what_the_first_epoch_shows(make_folder, build):
    folder = make_folder(sizes=[(96, 64)] * 12, caption="a, b, c, d, {n}")
    halves = np.zeros((64, 96, 3), np.uint8)
    halves[:, :48, 0], halves[:, 48:, 2] = 255, 255
    for n in range(12):
        Image.fromarray(halves).save(folder / f"{n:03d}.png")
    data = build(one_subset(folder, subset="flip_aug = true\nshuffle_caption = true\ncaption_prefix = 'p'"))
    (sheet,) = contact_sheets(data, 24)
    assert {"mirrored" in shot.marks for shot in sheet.shots} == {True, False}
    for index, shot in enumerate(sheet.shots):
        view = data.view(0, Sample(index, 0))
        assert (shot.caption, shot.written) == (view.caption, data.images[index].caption)
        left = pixels(shot.jpeg)[:, :16].mean(axis=(0, 1))
        assert (left[2] > left[0]) == view.crop.flipped == ("mirrored" in shot.marks)
        assert shot.marks[:2] == ("96x64 resized to 96x64", "cropped at 16, 0 (33% lost)")


def test_what_a_mask_leaves_out_is_dimmed(make_folder, build):
    folder, masks = make_folder(sizes=[(64, 64)]), make_folder("masks", sizes=[(64, 64)], caption=None)
    Image.new("RGB", (64, 64), "white").save(folder / "000.png")
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(masks / "000.png")
    data = build(one_subset(folder, subset=f"conditioning_data_dir = '{masks}'"), masked_loss=True)
    (shot,) = next(iter(contact_sheets(data, 1))).shots
    assert "masked" in shot.marks
    assert pixels(shot.jpeg)[:, :28].mean() == pytest.approx(51, abs=3) and pixels(shot.jpeg)[:, 36:].mean() > 250


def test_a_picture_that_breaks_is_named_in_its_place(make_folder, build):
    folder = make_folder()
    data = build(one_subset(folder))
    (folder / "002.png").write_bytes(b"not an image")
    page = page_of(data)
    assert len(page.all("img")) == 3 and len(page.all("figure")) == 4
    assert any("002.png: cannot be read" in text for text in page.text)


def test_each_bucket_shows_at_most_the_samples_asked_for(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64)] * 5 + [(32, 128)]), BUCKETED))
    assert [(sheet.images, len(sheet.shots)) for sheet in contact_sheets(data, 2)] == [(1, 1), (5, 2)]


def test_validation_images_have_sheets_of_their_own(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64)] * 10), subset="validation_split = 0.3"))
    assert [(sheet.role, sheet.images) for sheet in contact_sheets(data, 24)] == [("training", 7), ("validation", 3)]


# Text and JSON


def test_text_keeps_within_100_columns_but_for_names_that_do_not_break(make_folder, build):
    folder = make_folder("a" * 90, sizes=[(64, 64)] * 8 + [(20, 99)], caption="word " * 60 + "{n}")
    report = survey(build(one_subset(folder, subset="keep_tokens = 2")), [])
    long = [line for line in report_text(report).splitlines() if len(line) > WIDTH]
    assert all(len(word) > 60 for line in long for word in [max(line.split(), key=len)])
    assert len(report_text(report).splitlines()) > 20


def test_a_report_with_errors_alone_is_written_too():
    text = report_text(Report(findings=(finding("error", "dataset", "data.toml line 3: wrong"),)))
    assert text.splitlines() == ["1 error, 0 warnings, 0 notes", "", "errors", "- data.toml line 3: wrong"]


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_file_name_that_is_not_unicode_is_written_as_its_code(tmp_path: Path, name: str):
    write_report(Report(findings=(finding("error", "images", "bad\udcff.png: cannot be read"),)), tmp_path / name, None)
    assert "bad\\udcff.png" in (tmp_path / name).read_text(encoding="utf-8")


def test_json_holds_every_number_of_the_report(make_folder, build, tmp_path: Path):
    report = survey(build(one_subset(make_folder(), subset="validation_split = 0.5")), [], run={"steps": 7})
    write_report(report, tmp_path / "r.json", None)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["format"] == 1 and stored["run"] == {"steps": 7}
    assert [each["role"] for each in stored["datasets"]] == ["training", "validation"]
    assert stored["datasets"][0]["buckets"][0]["size"] == [64, 64]
    assert len(stored["findings"]) == len(report.findings)


@pytest.mark.parametrize(("name", "is_fine"), [("a.json", True), ("a.HTML", True), ("a.txt", False), ("a", False)])
def test_only_endings_with_a_format_are_taken(name: str, is_fine: bool):
    assert (ending_problem(Path(name)) is None) == is_fine


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"r\.json: cannot be written"):
        write_report(Report(findings=()), tmp_path / "file" / "r.json", None)


def test_numbers_have_units_that_fit():
    assert [amount(count) for count in (12, 1500, 32_300_000, 7 * 10**9)] == ["12 bytes", "1.5 kB", "32.3 MB", "7.0 GB"]
    assert [duration(seconds) for seconds in (0.0021, 0.02, 90, 600, 9000)] == ["2.1 ms", "20 ms", "90 s", "10 min", "2.5 h"]
    assert shortened("a" * 50 + "b" * 50, 23) == "a" * 10 + "..." + "b" * 10


# Copies and leaks


def topics(data) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in survey(data, []).findings:
        found.setdefault(each.topic, []).extend([each.text, *each.details])
    return found


def test_the_same_file_twice_is_told_with_its_captions(make_folder, build):
    folder = make_folder()
    (folder / "003.png").write_bytes((folder / "000.png").read_bytes())
    text, line = topics(build(one_subset(folder)))["duplicates"]
    assert "2 images, in groups: 1" in text and "000.png" in line and "003.png (with different captions)" in line


def test_an_image_in_two_datasets_is_no_copy(make_folder, build):
    text = one_subset(make_folder())
    assert not {"duplicates", "near duplicates"} & set(topics(build(text + text.replace("= 64", "= 32"))))


def test_a_copy_saved_anew_is_nearly_the_same(make_folder, build):
    folder = make_folder()
    Image.fromarray(noise((64, 64), 0)).save(folder / "001.png")
    Image.fromarray(noise((64, 64), 0)).resize((128, 128), Image.Resampling.NEAREST).save(folder / "003.png")
    found = topics(build(one_subset(folder)))
    assert "2 images, in groups: 1" in found["duplicates"][0]
    assert "3 images, in groups: 1" in found["near duplicates"][0]


@pytest.mark.parametrize(("copy", "said"), [(True, "is the same file as"), (False, "looks like")])
def test_a_validation_image_that_is_trained_on_is_a_leak(make_folder, build, copy: bool, said: str):
    train, held = make_folder("train"), make_folder("held", sizes=[(64, 64)] * 2)
    for n in range(2):
        Image.fromarray(noise((64, 64), 50 + n)).save(held / f"{n:03d}.png")
    picture = Image.fromarray(noise((64, 64), 2))
    picture.save(held / "001.png") if copy else picture.resize((96, 96)).save(held / "001.png")
    text = one_subset(train) + f"[[datasets.subsets]]\nimage_dir = '{held}'\nis_validation = true\n"
    summary, line = topics(build(text))["leak"]
    assert "1 of 2" in summary and f"{held / '001.png'} {said} {train / '002.png'}" == line


def test_clean_data_has_no_findings(make_folder, build):
    assert survey(build(one_subset(make_folder(), "batch_size = 2")), []).findings == ()
