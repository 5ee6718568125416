"""The numbers of a report: they are those of the epoch's order, of the placements, and of the caches that are written."""

import pytest
import torch
from dataset_samples import one_subset

from library.data.caches import fill_latents
from library.data.inspection.costs import ModelFacts, cache_facts
from library.data.inspection.counts import count_findings, dataset_facts, parts_of
from library.data.inspection.survey import survey

BUCKETED = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\nbatch_size = 4"
MODEL = ModelFacts(title="toy", latent_channels=3, pixels_per_latent=8)


def facts(data):
    return [dataset_facts(part) for part in parts_of(data)]


def said(data) -> dict[str, list[str]]:
    """The texts of the findings about counts, by topic."""
    found: dict[str, list[str]] = {}
    for part in parts_of(data):
        for each in count_findings(part, dataset_facts(part)):
            found.setdefault(each.topic, []).append(each.text)
    return found


def test_batches_and_buckets_are_those_of_the_order(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64)] * 5 + [(32, 128)] * 3), BUCKETED, "num_repeats = 3"))
    (own,) = facts(data)
    plans = data.order(0)
    assert own.batches == len(plans) and own.uses == sum(len(plan.samples) for plan in plans) == 24
    assert own.partial == sum(len(plan.samples) < 4 for plan in plans)
    for bucket in own.buckets:
        sizes = sorted(len(plan.samples) for plan in plans if plan.bucket == bucket.size)
        assert (bucket.batches, bucket.uses, bucket.last_batch) == (len(sizes), sum(sizes), sizes[0])


def test_lost_pixels_are_what_the_crop_leaves_out(make_folder, build):
    (own,) = facts(build(one_subset(make_folder(sizes=[(64, 64), (128, 64), (64, 256)]))))
    assert {name[-7:]: share for name, share in own.worst_crops} == {"002.png": 0.75, "001.png": 0.5}
    assert own.lost == pytest.approx((0 + 0.5 + 0.75) / 3)


def test_large_crops_are_a_warning_that_names_the_worst_first(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64), (128, 64), (64, 256)])))
    (part,) = parts_of(data)
    (cut,) = [each for each in count_findings(part, dataset_facts(part)) if each.topic == "crops"]
    assert "2 of 3" in cut.text and "enable_bucket" in cut.text
    assert [detail.rsplit(": ")[-1] for detail in cut.details] == ["75% of 64x256", "50% of 128x64"]


def test_enlarged_images_are_counted_with_their_factor(make_folder, build):
    (own,) = facts(build(one_subset(make_folder(sizes=[(32, 32), (64, 64), (48, 48), (99, 99)]))))
    assert own.enlarged == 2 and [factor for _, factor in own.most_enlarged] == [2.0, 1.333]


def test_nothing_is_said_of_sizes_that_fit(make_folder, build):
    assert said(build(one_subset(make_folder(), "batch_size = 2"))) == {}


def test_many_batches_that_are_not_full_are_said(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64), (32, 128), (128, 32)]), BUCKETED))
    assert "3 of 3" in said(data)["batches"][0]


def test_regularisation_images_are_balanced_and_said(make_folder, build):
    text = one_subset(make_folder("train"), "batch_size = 2", "num_repeats = 3")
    text += f"[[datasets.subsets]]\nimage_dir = '{make_folder('reg', sizes=[(64, 64)] * 2)}'\nis_reg = true\n"
    data = build(text)
    (own,) = facts(data)
    assert (own.uses, own.reg_uses) == (24, 12)
    assert "12 uses of regularisation images, each repeated up to 6 times, for 12 of the others" in said(data)["balance"][0]


def test_validation_images_are_a_part_of_their_own(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(64, 64)] * 10), "batch_size = 3", "num_repeats = 2\nvalidation_split = 0.2"))
    training, validation = facts(data)
    assert (training.role, training.images, training.uses) == ("training", 8, 16)
    assert (validation.role, validation.images, validation.uses) == ("validation", 2, 2)


@pytest.mark.parametrize("subset", ["", "flip_aug = true", "validation_split = 0.5"])
def test_the_size_of_the_latent_cache_is_that_of_the_tensors_written(make_folder, build, subset):
    data = build(one_subset(make_folder(sizes=[(64, 64)] * 3 + [(32, 128)] * 2), BUCKETED, subset))
    foreseen = cache_facts(data, MODEL, cut=None)
    sizes: list[int] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        latents = torch.nn.functional.avg_pool2d(pixels, 8)
        sizes.extend(row.numel() * 4 for row in latents)
        return latents

    fill_latents(data, encode, identity="toy", to_disk=False, batch_size=2)
    assert (foreseen.latent_entries, foreseen.latent_bytes) == (len(sizes), sum(sizes))


def test_images_with_and_without_their_mask_are_two_entries_of_the_latent_cache(make_folder, build):
    folder = make_folder(sizes=[(64, 64)] * 2)
    data = build(one_subset(folder, subset="alpha_mask = true") + f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    foreseen = cache_facts(data, MODEL, cut=None)
    assert (foreseen.latent_entries, foreseen.latent_bytes) == (4, 2 * (3 + 4) * 8 * 8 * 4)


def test_a_cache_that_the_options_forbid_has_no_size(make_folder, build):
    data = build(one_subset(make_folder(), subset="random_crop = true\nshuffle_caption = true"))
    found = cache_facts(data, MODEL, cut=None)
    assert (found.latent_entries, found.latent_bytes, found.text_entries) == (None, None, None)


def test_a_text_cache_counts_each_caption_once_and_the_empty_one(make_folder, build):
    folder = make_folder(caption="same")
    (folder / "000.txt").write_text("another")
    data = build(one_subset(folder, subset="caption_dropout_rate = 0.5"))
    model = ModelFacts(title="toy", latent_channels=3, pixels_per_latent=8, text_bytes=lambda tokens: 10 + tokens)
    found = cache_facts(data, model, cut=None)
    assert (found.text_entries, found.text_bytes) == (3, 30 + 1 + 1)


def test_a_small_part_of_the_uses_is_said(make_folder, build):
    text = one_subset(make_folder("many"), subset="num_repeats = 1000")
    text += f"[[datasets.subsets]]\nimage_dir = '{make_folder('few', sizes=[(64, 64)])}'\n"
    assert "few is 0.0% of the uses" in said(build(text))["balance"][0]


def test_a_survey_writes_nothing_beside_the_images(make_folder, build):
    folder = make_folder()
    before = sorted(path.name for path in folder.iterdir())
    survey(build(one_subset(folder)), [MODEL])
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_file_that_breaks_after_its_header_is_an_error(make_folder, build):
    folder = make_folder()
    data = build(one_subset(folder))
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    report = survey(data, [])
    (error,) = report.of_level("error")
    assert "001.png" in error.text and report.is_bad()


def test_time_is_measured_on_at_most_twelve_images_spread_over_the_data(make_folder, build):
    data = build(one_subset(make_folder(sizes=[(32, 32)] * 30)))
    report = survey(data, [])
    assert report.time is not None and report.time.sampled == 12 and report.time.seconds_an_image > 0
    assert "megapixels a second" in report.time.assumption


def test_what_is_idle_in_the_dataset_file_is_among_the_warnings(make_folder, build):
    report = survey(build(one_subset(make_folder(), subset="keep_tokens = 1")), [])
    assert any("keep_tokens has no effect" in each.text for each in report.of_level("warning"))


def test_strict_makes_warnings_bad(make_folder, build):
    report = survey(build(one_subset(make_folder(), subset="keep_tokens = 1")), [])
    assert not report.is_bad() and report.is_bad(strict=True)


def test_a_mask_that_breaks_is_an_error(make_folder, build):
    masks = make_folder("masks", caption=None)
    data = build(one_subset(make_folder(), subset=f"conditioning_data_dir = '{masks}'"), masked_loss=True)
    (masks / "001.png").write_bytes((masks / "001.png").read_bytes()[:-80])
    report = survey(data, [])
    (broken,) = report.of_level("error")
    assert f"{masks / '001.png'}: cannot be read" in broken.text and report.time is None
