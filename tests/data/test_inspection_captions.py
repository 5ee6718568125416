"""What a report says of captions, tags, options and files that are not read."""

from collections import Counter

import pytest
from dataset_samples import noise, one_subset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.inspection.conflicts import conflict_findings
from library.data.inspection.costs import ModelFacts, Texts, cut_captions, estimated_tokens, length_findings
from library.data.inspection.counts import parts_of
from library.data.inspection.folders import folder_findings
from library.data.inspection.wording import caption_facts, caption_findings, likely_typos


def write(folder, captions: list[str]) -> None:
    for n, caption in enumerate(captions):
        (folder / f"{n:03d}.txt").write_text(caption)


def conflicts(data) -> list[str]:
    return [each.text for part in parts_of(data) for each in conflict_findings(part)]


def test_tags_are_counted_once_a_caption_in_lower_case(make_folder, build):
    folder = make_folder()
    write(folder, ["Red, red, cat", "red, dog", "blue|||dog, cat", "red"])
    facts = caption_facts(build(one_subset(folder, subset="keep_tokens_separator = '|||'")).images)
    assert dict(facts.frequent) == {"red": 3, "dog": 2, "cat": 2, "blue": 1}
    assert (facts.tags, facts.once, facts.distinct, facts.are_tags) == (4, 1, 4, True)


def test_sentences_are_not_taken_for_tags(make_folder, build):
    facts = caption_facts(build(one_subset(make_folder(caption="a very long sentence about what is seen in picture {n}"))).images)
    assert not facts.are_tags and facts.likely_typos == () and facts.longest_words == 11


def test_an_image_in_two_datasets_is_counted_once(make_folder, build):
    text = one_subset(make_folder())
    assert caption_facts(build(text + text.replace("= 64", "= 32")).images).images == 4


@pytest.mark.parametrize("slip", ["blue eyse", "blue eys", "blu eyes", "bluee eyes", "blue eyez"])
def test_a_rare_tag_one_slip_from_a_frequent_one_is_named(slip):
    assert likely_typos(Counter({"blue eyes": 20, slip: 1, "red hair": 9})) == [(slip, "blue eyes", 20)]


@pytest.mark.parametrize("other", ["blue eyes", "2girls", "girls", "blue", "green eyes"])
def test_numbers_plurals_and_other_words_are_no_slips(other):
    assert likely_typos(Counter({"1girls": 40, "girl": 40, "blue eye": 40, "glue": 40, other: 1})) == []


def test_two_tags_about_as_frequent_are_both_meant():
    assert likely_typos(Counter({"short hair": 20, "shirt hair": 9})) == []


@given(st.text(alphabet="abcd ", min_size=6, max_size=12), st.integers(0, 11), st.sampled_from("xyz"))
def test_every_changed_letter_is_found(tag, place, letter):
    slip = tag[: place % len(tag)] + letter + tag[place % len(tag) + 1 :]
    assert likely_typos(Counter({tag: 50, slip: 1})) == [(slip, tag, 50)]


def test_empty_and_shared_captions_are_told(make_folder, build):
    folder = make_folder()
    write(folder, ["cat", "cat", "dog"])
    (folder / "003.txt").unlink()
    data = build(one_subset(folder, subset="class_tokens = ''"))
    found = {each.level: each for each in caption_findings(data.images, caption_facts(data.images))}
    assert found["warning"].text.startswith("empty captions: 1 of 4") and found["warning"].details[0].endswith("003.png")
    assert "1, of 2 images" in found["note"].text and found["note"].details == ("2 x 'cat'",)


def test_class_tokens_are_not_called_a_shared_caption(make_folder, build):
    data = build(one_subset(make_folder(caption=None), subset="class_tokens = 'sks cat'"))
    assert list(caption_findings(data.images, caption_facts(data.images))) == []


@pytest.mark.parametrize(
    ("options", "caption", "said"),
    [
        ("shuffle_caption = true", "one part", "shuffle_caption = true: no caption has three parts"),
        ("shuffle_caption = true\nkeep_tokens = 9", "a, b, c, {n}", "keep_tokens = 9: 4 of 4 captions have no more parts"),
        ("shuffle_caption = true\nkeep_tokens_separator = '|||'", "a, b, c", "keep_tokens_separator = '|||': no caption holds"),
        ("secondary_separator = ';;;'", "a, b", "secondary_separator = ';;;': no caption holds"),
        ("enable_wildcard = true", "a, b", "enable_wildcard = true: no caption has choices"),
        ("caption_dropout_rate = 1.0", "a", "caption_dropout_rate = 1.0: every caption is emptied"),
        ("caption_dropout_every_n_epochs = 1", "a", "every epoch has empty captions"),
        ("flip_aug = true", "a sword in the left hand", "flip_aug = true: 4 of 4 captions speak of left"),
        ("random_crop = true", "a", "random_crop = true: no image has anything to crop"),
        ("face_crop_aug_range = [1.0, 2.0]", "a", "no file name ends with the place of a face"),
        ("", "a {{red|blue}} cat", "captions with choices in braces, read as they stand without enable_wildcard: 4"),
    ],
)
def test_an_option_in_conflict_with_the_data_is_a_warning(make_folder, build, options, caption, said):
    (text,) = conflicts(build(one_subset(make_folder(caption=caption), subset=options)))
    assert said in text


@pytest.mark.parametrize(
    "options",
    [
        "shuffle_caption = true\nkeep_tokens = 1",
        "shuffle_caption = true\nkeep_tokens_separator = 'b'",
        "secondary_separator = 'b'",
        "flip_aug = true",
        "caption_dropout_rate = 0.1\ncaption_dropout_every_n_epochs = 3",
    ],
)
def test_options_that_fit_the_data_are_not_talked_about(make_folder, build, options):
    assert conflicts(build(one_subset(make_folder(caption="a, b, c, {n}"), subset=options))) == []


# Lengths


def model(**more) -> ModelFacts:
    return ModelFacts(title="toy", latent_channels=3, pixels_per_latent=8, **more)


def test_captions_too_long_for_the_tokenizer_are_named_longest_first(make_folder, build):
    folder = make_folder()
    write(folder, ["a", "a b c d", "a b c", "b"])
    texts = Texts(build(one_subset(folder)).images)
    counting = model(caption_limit=2, over=lambda captions: [max(0, len(caption.split()) - 2) for caption in captions])
    cut = cut_captions(texts, counting)
    assert cut == [(2, "a b c d"), (1, "a b c")]
    (found,) = length_findings(texts, counting, cut)
    assert "2 of 4 (by its tokenizer)" in found.text and found.details[0].endswith("001.png: 2 tokens too long")


def test_without_a_tokenizer_lengths_are_estimated_and_said_so(make_folder, build):
    texts = Texts(build(one_subset(make_folder(caption="one two three four {n}"))).images)
    (found,) = length_findings(texts, model(caption_limit=4), cut_captions(texts, model(caption_limit=4)))
    assert "4 of 4 (by an estimate from words, without its tokenizer)" in found.text


def test_without_a_limit_nothing_is_said_of_lengths(make_folder, build):
    texts = Texts(build(one_subset(make_folder())).images)
    assert cut_captions(texts, model()) is None and list(length_findings(texts, model(), ())) == []


def test_every_choice_and_line_of_a_caption_is_measured_with_its_prefix(make_folder, build):
    folder = make_folder(sizes=[(64, 64)])
    write(folder, ["a {red|light blue} cat\nsecond"])
    data = build(one_subset(folder, subset="enable_wildcard = true\ncaption_prefix = 'p'"))
    assert set(Texts(data.images).images) == {"p a red cat", "p a light blue cat", "p second"}


def test_a_caption_with_very_many_choices_is_measured_as_written(make_folder, build):
    folder = make_folder(sizes=[(64, 64)])
    write(folder, ["{a|b|c|d}" * 8])
    assert list(Texts(build(one_subset(folder, subset="enable_wildcard = true")).images).images) == ["{a|b|c|d}" * 8]


@given(st.lists(st.sampled_from(["cat", "photograph", "7", ",", "hat"]), max_size=20))
def test_an_estimate_grows_with_every_word(words):
    counts = [estimated_tokens(" ".join(words[:n])) for n in range(len(words) + 1)]
    assert counts == sorted(set(counts))


# Files


def folder_texts(data) -> list[str]:
    return [each.text for each in folder_findings(data)]


def test_captions_without_an_image_are_named(make_folder, build):
    folder = make_folder()
    (folder / "orphan.txt").write_text("x")
    (found,) = folder_findings(build(one_subset(folder)))
    assert found.text.endswith(": 1") and found.details == ("orphan.txt",)


def test_images_of_kinds_that_are_not_read_are_named_with_what_to_do(make_folder, build):
    folder = make_folder()
    for name in ("a.gif", "b.GIF"):
        (folder / name).write_bytes(b"")
    (found,) = folder_findings(build(one_subset(folder)))
    assert ".gif images, which are not read here: 2; convert them" in found.text and found.details == ("a.gif", "b.GIF")


def test_a_caption_of_the_second_ending_beside_one_of_the_first_is_not_read(make_folder, build):
    folder = make_folder()
    (folder / "001.caption").write_text("x")
    (found,) = folder_findings(build(one_subset(folder)))
    assert found.details == ("001.txt",)


def test_images_in_folders_inside_are_told_but_not_those_of_named_or_hidden_ones(make_folder, build):
    folder = make_folder()
    for inner in ("named", "left", ".hidden"):
        (folder / inner).mkdir()
        Image.fromarray(noise((32, 32), 9)).save(folder / inner / "a.png")
    text = one_subset(folder) + f"[[datasets.subsets]]\nimage_dir = '{folder / 'named'}'\nclass_tokens = 'x'\n"
    (found,) = folder_findings(build(text))
    assert "not read: 1" in found.text and found.details == ("left: 1",)


def test_masks_without_an_image_are_named(make_folder, build):
    folder, masks = make_folder(), make_folder("masks", sizes=[(64, 64)] * 6, caption=None)
    (found,) = folder_findings(build(one_subset(folder, subset=f"conditioning_data_dir = '{masks}'"), masked_loss=True))
    assert found.text.startswith(str(masks)) and found.details == ("004.png", "005.png")


def test_a_folder_in_two_datasets_is_looked_at_once(make_folder, build):
    folder = make_folder()
    (folder / "orphan.txt").write_text("x")
    text = one_subset(folder)
    assert len(folder_texts(build(text + text.replace("= 64", "= 32")))) == 1
