"""What a use of an image shows: forms of its caption, and parts that come in the course of the run."""

from dataset_samples import one_subset

from library.data.order import Sample
from library.data.views import Clock


def captions(data, epochs: int = 20) -> set[str]:
    return {data.view(epoch, Sample(0, 0)).caption for epoch in range(epochs)}


def test_a_caption_has_as_many_forms_as_asked_and_all_of_them_are_known_before(make_folder, build):
    folder = make_folder(sizes=[(64, 64)], caption="a, b, c, d, e, f")
    data = build(one_subset(folder, subset="shuffle_caption = true"), cache_text_encoder_outputs=True, text_cache_variants=3)
    assert len(captions(data)) == 3
    assert captions(data) == set(data.captions_to_cache())


def test_without_a_text_cache_captions_are_drawn_freely(make_folder, build):
    folder = make_folder(sizes=[(64, 64)], caption="a, b, c, d, e, f")
    data = build(one_subset(folder, subset="shuffle_caption = true"), text_cache_variants=3)
    assert len(captions(data)) > 3


def test_an_image_that_is_added_changes_no_form_of_the_others(make_folder, build):
    options = {"cache_text_encoder_outputs": True, "text_cache_variants": 3}
    folder = make_folder(sizes=[(64, 64)] * 2, caption="a, b, c, d, e, {n}")
    before = build(one_subset(folder, subset="shuffle_caption = true"), **options).captions_to_cache()
    for ending in (".png", ".txt"):
        (folder / f"000{ending}").rename(folder / f"009{ending}")
    assert set(build(one_subset(folder, subset="shuffle_caption = true"), **options).captions_to_cache()) == set(before)


def test_the_text_cache_knows_every_caption_that_wildcards_make(make_folder, build):
    folder = make_folder(sizes=[(64, 64)], caption="a {{red|blue}} {{cat|dog}}")
    data = build(one_subset(folder, subset="enable_wildcard = true\ncaption_dropout_rate = 0.3"), cache_text_encoder_outputs=True)
    assert set(data.captions_to_cache()) == captions(data, 60) == {"", "a red cat", "a red dog", "a blue cat", "a blue dog"}


def test_parts_of_a_caption_come_in_step_by_step(make_folder, build):
    folder = make_folder(sizes=[(64, 64)] * 4, caption="a, b, c, d, e")
    data = build(one_subset(folder, subset="token_warmup_step = 0.5\ntoken_warmup_min = 1"))
    data.set_clock(Clock(steps=16, steps_per_epoch=4))
    assert [data.batch(step // 4, step % 4).captions[0].count(",") for step in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_the_clock_counts_optimizer_steps(make_folder, build):
    clock = Clock(steps=100, steps_per_epoch=5, batches_per_step=3)
    assert [clock.step(epoch, position) for epoch, position in ((0, 0), (0, 2), (0, 3), (2, 0), (2, 14))] == [0, 0, 1, 10, 14]
