"""Network arguments: their checks, other tools' names for them, and what is said of arguments that do nothing."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from library.core.options import Given, option, read_group
from library.models.naming import Naming, Target, naming_named
from networks.arguments import FROM_FILE, NetworkArguments, boosted_by
from networks.lokr import LoKr, LoKrArguments
from networks.lora import LoRA
from networks.selection import read_arguments


@pytest.fixture
def naming() -> Naming:
    return naming_named("sdxl")


def read(naming: Naming, kind: type[NetworkArguments] = NetworkArguments, **given: Any) -> NetworkArguments:
    problems: list[str] = []
    arguments, _ = read_arguments(kind, given, naming, problems)
    assert arguments is not None and not problems
    return arguments


def problems(naming: Naming, kind: type[NetworkArguments] = NetworkArguments, signature: tuple[str, ...] = (), **given: Any) -> list[str]:
    found: list[str] = []
    read_arguments(kind, given, naming, found, signature)
    assert found
    return found


@pytest.mark.parametrize("word", ["False", "false", "0", "no", "off", False, 0])
def test_every_word_for_no_turns_an_argument_off(naming: Naming, word: Any):
    assert read(naming, use_scalar=word).use_scalar is False


@pytest.mark.parametrize("name", ["use_tucker", "use_cp", "use_conv_cp"])
def test_lycoris_spellings_of_tucker_are_understood(naming: Naming, name: str):
    given: dict[str, Any] = {name: "True"}
    assert read(naming, conv_dim="4", **given).use_tucker is True


def test_two_spellings_of_one_argument_are_refused(naming: Naming):
    found = problems(naming, conv_dim=4, use_tucker=True, use_cp=True)
    assert found == ["--network_args use_cp: use_tucker is given twice, also as use_tucker"]


def test_what_is_not_given_may_be_none(naming: Naming):
    assert read(naming, exclude_patterns=None, target_modules=None) == NetworkArguments()


def test_blank_texts_are_no_patterns(naming: Naming):
    blank: dict[str, Any] = dict.fromkeys(
        ("exclude_patterns", "only_patterns", "target_modules", "network_reg_dims", "loraplus_targets"), ""
    )
    arguments = read(naming, **blank)
    assert not any(arguments.patterns(name).entries for name in blank if name != "loraplus_targets")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use_tucker": "True"}, "use_tucker=True: is without effect unless conv_dim is given too"),
        ({"conv_alpha": 1}, "conv_alpha=1.0: is without effect unless conv_dim is given too"),
        ({"conv_block_alphas": [1.0] * 23}, "is without effect unless conv_block_dims or conv_dim is given too"),
        ({"wd_on_output": "False"}, "wd_on_output=False: is without effect unless dora_wd is given too"),
        ({"dora_norm": "full"}, "dora_norm=full: is without effect unless dora_wd is given too"),
        ({"rank_dropout_mode": "rows"}, "rank_dropout_mode=rows: is without effect unless rank_dropout is given too"),
        ({"path": "materialise", "rank_dropout": 0.1}, "path=materialise: is without effect unless rank_dropout_mode=rows is given too"),
        ({"autotune": True, "rank_dropout": 0.1}, "autotune=True: is without effect unless rank_dropout_mode=rows is given too"),
        ({"block_lr_zero_threshold": 0.1}, "unless down_lr_weight, mid_lr_weight or up_lr_weight is given too"),
        ({"loraplus_targets": "lora_up"}, "loraplus_targets=lora_up: is without effect unless loraplus_lr_ratio is given too"),
    ],
)
def test_an_argument_without_effect_is_refused(naming: Naming, given: dict[str, Any], words: str):
    assert words in problems(naming, **given)[0]


@pytest.mark.parametrize(
    "given",
    [
        {"use_tucker": True, "conv_alpha": 1, "conv_dim": 2},
        {"use_tucker": True, "conv_alpha": 1, "conv_block_dims": [2] * 23},
        {"use_tucker": True, "conv_alpha": 1, "target_modules": "conv_in"},
        {"dora_wd": True, "wd_on_output": False, "dora_norm": "full"},
        {"rank_dropout": 0.1, "rank_dropout_mode": "rows", "path": "materialise"},
        {"loraplus_unet_lr_ratio": 4, "loraplus_targets": ["lora_up"]},
    ],
)
def test_an_argument_with_what_it_needs_is_taken(naming: Naming, given: dict[str, Any]):
    found, plain = read(naming, **given), read(naming)
    assert all(getattr(found, name) != getattr(plain, name) for name in given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"conv_alpha": -1, "conv_dim": 1}, "conv_alpha=-1.0: must not be negative"),
        ({"conv_alpha": "inf", "conv_dim": 1}, "conv_alpha=inf: is too large"),
        ({"block_dims": "4,-1"}, "block_dims=4,-1: must not be negative"),
        ({"rank_dropout": 1}, "rank_dropout=1.0: must be at least 0 and less than 1"),
        ({"dora_norm": "detach", "dora_wd": 1}, "dora_norm: unknown choice 'detach'; did you mean 'detached'?"),
        ({"network_reg_alphas": "a=-1"}, "network_reg_alphas 'a': an alpha must not be negative"),
        ({"network_reg_dims": "a=1.5"}, "network_reg_dims 'a': a rank must be a whole number of at least 1"),
        ({"target_modules": "to_q("}, "target_modules 'to_q(': not a regular expression"),
        ({"only_patterns": "['a', '(']"}, "only_patterns '(': not a regular expression"),
        ({"use_scalar": "perhaps"}, "use_scalar: 'perhaps' is not true or false"),
    ],
)
def test_a_value_out_of_range_is_refused(naming: Naming, given: dict[str, Any], words: str):
    assert words in "\n".join(problems(naming, **given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"algo": "loha"}, "algo: here the module is the algorithm: --network_module networks.loha"),
        ({"algo": "locon"}, "--network_module networks.lora with conv_dim"),
        ({"algo": "boft"}, "lycoris.kohya has others"),
        ({"preset": "full"}, "target_modules, only_patterns and exclude_patterns choose the layers"),
        ({"bypass_mode": "True"}, "the delta's path is always separate"),
        ({"rank_dropout_scale": "True"}, "always scaled by 1/(1-p)"),
        ({"train_norm": "True"}, "use --network_module lycoris.kohya"),
        ({"block_size": "4"}, "use --network_module lycoris.kohya"),
        ({"disable_conv_cp": "True"}, "turn Tucker cores on with use_tucker=True"),
        ({"dim": "4"}, "give the rank with --network_dim"),
        ({"factor": "4"}, "an argument of LoKr alone: --network_module networks.lokr"),
        ({"use_rslora": "True"}, "is spelled rs_lora here"),
        ({"train_llm_adapter": "True"}, "SDXL has no such layers"),
        ({"only_pattern": "a"}, "unknown network argument 'only_pattern'; did you mean 'only_patterns'?"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_what_to_use(naming: Naming, given: dict[str, Any], words: str):
    assert words in "\n".join(problems(naming, **given))


def test_everything_wrong_is_said_at_once(naming: Naming):
    found = problems(naming, LoKrArguments, algo="lokr", conv_dim="x", dora_norm="full", block_dims="1,2", factor=0)
    assert [problem.split()[1].split("=")[0].rstrip(":") for problem in found] == ["algo", "conv_dim", "dora_norm", "factor", "block_dims"]


def test_boosted_parameters_are_those_of_the_algorithm(naming: Naming):
    arguments = NetworkArguments(loraplus_lr_ratio=4, loraplus_targets=("lora_up", "lora_down.weight"))
    assert boosted_by(arguments, LoRA.signature) == (("lora_up.weight", "lora_down.weight"), [])
    found = problems(naming, LoKrArguments, LoKr.signature, loraplus_lr_ratio=4, loraplus_targets="lokr_w3,up")
    assert "no parameter 'lokr_w3'; did you mean 'lokr_w" in found[0]
    assert "no parameter 'up'; there are lokr_w1," in found[1]


@dataclass(kw_only=True, frozen=True)
class OwnArguments(NetworkArguments):
    """Arguments of an algorithm with a table of its own."""

    tables: ClassVar[tuple[str, ...]] = (*NetworkArguments.tables, "network_reg_sizes")
    network_reg_sizes: dict | str | None = option(None, help="sizes by regex")


def test_tables_of_an_algorithm_are_checked_as_all_are(naming: Naming):
    assert "network_reg_sizes 'a(': not a regular expression" in problems(naming, OwnArguments, network_reg_sizes="a(=1")[0]
    arguments = read_group(OwnArguments, [Given("network_reg_sizes", "a=3", "here")])
    assert [entry.value for entry in arguments.patterns("network_reg_sizes").entries] == [3.0]


def test_without_values_by_layer_the_arguments_hold_everywhere():
    arguments = NetworkArguments()
    assert arguments.at(Target(name="a", path="a", module_path="a", group="", container="")) is arguments


def test_arguments_that_a_file_decides_exist():
    names = {*LoKrArguments.__dataclass_fields__, "use_cp", "use_conv_cp", "weight_decompose"}
    assert set(FROM_FILE) <= names
