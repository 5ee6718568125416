"""What the user says of several processes reaches accelerate, or is said to be in vain."""

from datetime import timedelta

from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from library.training.distributed import DistributedOptions


def test_ddp_looks_for_unused_parameters_unless_the_graph_is_static() -> None:
    (plain,) = DistributedOptions().handlers()
    (static,) = DistributedOptions(ddp_static_graph=True, ddp_gradient_as_bucket_view=True).handlers()
    assert isinstance(plain, DistributedDataParallelKwargs) and isinstance(static, DistributedDataParallelKwargs)
    assert (plain.find_unused_parameters, plain.static_graph, plain.gradient_as_bucket_view) == (True, False, False)
    assert (static.find_unused_parameters, static.static_graph, static.gradient_as_bucket_view) == (False, True, True)


def test_the_wait_is_in_minutes() -> None:
    _, group = DistributedOptions(ddp_timeout=90).handlers()
    assert isinstance(group, InitProcessGroupKwargs) and group.timeout == timedelta(minutes=90)


def test_a_wait_of_nothing_is_refused() -> None:
    assert list(DistributedOptions(ddp_timeout=0).check()) == ["--ddp_timeout 0: minutes, at least 1"]


def test_one_process_hears_what_it_gave_in_vain() -> None:
    options = DistributedOptions(ddp_timeout=5, ddp_static_graph=True)
    assert [sentence.split()[0] for sentence in options.in_vain(1)] == ["--ddp_timeout", "--ddp_static_graph"]
    assert list(options.in_vain(2)) == []
