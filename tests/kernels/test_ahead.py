"""Every shipped kernel compiles for every architecture, within its limits; and the check that says so notices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from preble.errors import DeviceError
from preble.kernels import ahead
from preble.kernels.ahead import Resources, compile_launch, specialisation
from preble.kernels.architecture import SM_80, SM_90
from preble.kernels.launch import recorded_launches
from preble.kernels.variants import pairwise, variants

CACHE_OF_TRITON = "triton_cache"
ATTENTION = {"paged_decode_kernel", "_paged_extend", "shared_prefix_kernel"}
SOME = ("llama-3-8b", "gemma-2-9b", "extend: llama-3.2-1b, page_size 64", "prepare")
"""In names of variants: the shape that most models have and the one that takes the most registers and shared memory,
each with every option; what has tiles of its own for narrow heads; what has no model's shape. A third of all."""


class Checked:
    """The outcome of one run of `python -m preble.kernels.ahead`."""

    def __init__(self, folder: Path, *options: str) -> None:
        out = folder / "figures.json"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
        environment["TRITON_CACHE_DIR"] = str(folder / CACHE_OF_TRITON)
        command = [sys.executable, "-m", "preble.kernels.ahead", "--json", str(out), *options]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        self.exit_code = finished.returncode
        self.output = finished.stdout
        self.errors = finished.stderr
        self.figures: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []

    def of(self, variant: str, architecture: str) -> list[dict[str, Any]]:
        """In the order of batch sizes."""
        return [f for f in self.figures if f["variant"] == variant and f["architecture"] == architecture]

    def one(self, variant: str, architecture: str) -> dict[str, Any]:
        (figures,) = self.of(variant, architecture)
        return figures


# --- The check, on kernels with known faults ---


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return Checked(tmp_path_factory.mktemp("samples"), "--variants", "sample_kernels", "--jobs", "1")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
class TestSamples:
    @pytest.mark.parametrize("variant", ["good copy", "good product"])
    def test_a_good_kernel_has_no_fault(self, samples: Checked, architecture: str, variant: str) -> None:
        done = samples.one(variant, architecture)
        assert done["faults"] == []
        assert f"{variant}: " not in samples.output
        assert 0 < done["resources"]["registers"] <= 255
        assert done["resources"]["ptx_bytes"] > 1000
        assert done["resources"]["seconds"] > 0

    def test_launches_that_share_a_binary_are_compiled_once(self, samples: Checked, architecture: str) -> None:
        assert samples.of("the same product", architecture) == []

    def test_tensor_cores_are_counted_by_their_kind(self, samples: Checked, architecture: str) -> None:
        used = samples.one("good product", architecture)["resources"]
        kind, other = ("mma", "wgmma") if architecture == "sm_80" else ("wgmma", "mma")
        assert used[kind] > 0
        assert used[other] == 0
        assert samples.one("good copy", architecture)["resources"][kind] == 0

    def test_shared_memory_follows_from_the_tiles(self, samples: Checked, architecture: str) -> None:
        """Two bf16 blocks of 64 x 64 in each stage; the newer pipeline keeps one stage more in flight."""
        used = samples.one("good product", architecture)["resources"]["shared_memory"]
        assert used == 2 * 64 * 64 * 2 * (1 if architecture == "sm_80" else 2)

    @pytest.mark.parametrize(("variant", "wide"), [("good copy", True), ("odd stride", False), ("odd address", False)])
    def test_a_lost_alignment_shows_in_the_loads(
        self, samples: Checked, architecture: str, variant: str, wide: bool
    ) -> None:
        """1,024 columns of 2 bytes on 128 threads: one load of 16 bytes each, or 8 of 2."""
        used = samples.one(variant, architecture)["resources"]
        assert (used["wide_loads"], used["loads"]) == ((1, 1) if wide else (0, 8))

    def test_spills_are_noticed(self, samples: Checked, architecture: str) -> None:
        done = samples.one("spills", architecture)
        used = done["resources"]
        assert used["spill_stores"] > 0
        assert used["spill_loads"] > 0
        assert done["faults"] == [f"spills {used['spill_stores']} bytes and reads {used['spill_loads']}"]

    def test_too_much_shared_memory_is_noticed(self, samples: Checked, architecture: str) -> None:
        """Triton compiles it all the same: only the launch would fail."""
        done = samples.one("much shared memory", architecture)
        limit = 99 if architecture == "sm_80" else 227
        needed = done["resources"]["shared_memory"] / 1024
        assert needed > limit
        assert done["faults"] == [f"needs {needed:.1f} KiB of shared memory, of {limit}"]

    def test_compiling_again_for_another_batch_size_is_noticed(self, samples: Checked, architecture: str) -> None:
        """Batch sizes of 1 become constants, multiples of 16 are marked: three kernels where one should do."""
        first, *others = samples.of("compiled again", architecture)
        assert (first["size"], first["faults"]) == (1, [])
        assert [(done["size"], done["faults"]) for done in others] == [
            (2, ["is compiled again at this batch size, for rows"]),
            (16, ["is compiled again at this batch size, for rows"]),
        ]
        assert samples.of("compiled again, knowingly", architecture) == []

    def test_what_cannot_be_compiled_is_named(self, samples: Checked, architecture: str) -> None:
        done = samples.one("cannot be compiled", architecture)
        assert done["resources"] is None
        assert done["faults"][0].startswith("cannot be compiled: CompilationError: at 2:")

    def test_the_output_names_variant_architecture_and_figure(self, samples: Checked, architecture: str) -> None:
        assert samples.exit_code == 1
        spilled = samples.one("spills", architecture)["resources"]
        assert (
            f"spills: _product on {architecture} at batch size 1: "
            f"spills {spilled['spill_stores']} bytes and reads {spilled['spill_loads']}\n"
        ) in samples.output


def test_only_and_architecture_choose(tmp_path: Path) -> None:
    options = "--variants sample_kernels --only copy --only product --architecture sm_80 --jobs 1"
    checked = Checked(tmp_path, *options.split())
    assert {(done["variant"], done["architecture"]) for done in checked.figures} == {
        ("good copy", "sm_80"),
        ("good product", "sm_80"),
    }
    assert checked.exit_code == 0
    assert "2 compiled in " in checked.output
    assert not (tmp_path / CACHE_OF_TRITON).exists(), "the check must neither use nor fill Triton's cache"


def test_limits() -> None:
    def faults(warps: int = 4, **changed: int) -> list[str]:
        figures: dict[str, Any] = dict.fromkeys(Resources.__dataclass_fields__, 0) | {"registers": 128} | changed
        return Resources(**figures).faults(SM_80, warps)

    assert faults() == []
    assert faults(shared_memory=99 * 1024) == []
    assert faults(shared_memory=99 * 1024 + 512) == ["needs 99.5 KiB of shared memory, of 99"]
    assert faults(warps=16) == []
    assert faults(warps=16, registers=136) == ["needs 136 registers for each of 512 threads, of 65536"]
    assert faults(spill_loads=4) == ["spills 0 bytes and reads 4"]
    assert faults(stack_frame=8) == ["keeps 8 bytes per thread in local memory"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_interpreted_kernels_are_refused() -> None:
    from sample_kernels import variants as samples

    with recorded_launches() as launches:
        next(iter(samples(False))).call(1)
    for refused in (compile_launch, specialisation):
        with pytest.raises(DeviceError, match="Unset it before starting Python"):
            refused(launches[0], SM_90)


# --- What is shipped ---


def test_pairs_of_options_meet() -> None:
    options: dict[str, list[Any]] = {"a": [1, 2, 3], "b": [False, True], "c": [None, 4096], "d": [5, 6]}
    choices = pairwise(options)
    for one, other in combinations(options, 2):
        met = {(choice[one], choice[other]) for choice in choices}
        assert met == set(product(options[one], options[other]))
    assert {"a": 3, "b": False, "c": None, "d": 5} in choices
    assert len(choices) < 24 / 2


def test_variants_have_names_of_their_own() -> None:
    for full in (False, True):
        names = [variant.name for variant in variants(full)]
        assert len(set(names)) == len(names)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("sm_90", *SOME), id="some-sm_90"),
        pytest.param(("sm_90",), id="all-sm_90", marks=pytest.mark.long),
        pytest.param(("sm_80",), id="all-sm_80", marks=pytest.mark.long),
    ],
)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """Variants for an architecture."""
    architecture, *names = request.param
    only = [option for name in names for option in ("--only", name)]
    return Checked(tmp_path_factory.mktemp(architecture), "--architecture", architecture, *only)


def test_every_shipped_variant_is_in_order(shipped: Checked) -> None:
    """Compiles, keeps its registers and its shared memory within the chip's, and serves all batch sizes as one."""
    assert shipped.figures, shipped.errors
    assert shipped.exit_code == 0, shipped.output[shipped.output.index(" not in order") :]


def test_every_kernel_is_shipped_in_some_variant(shipped: Checked) -> None:
    launched = {
        kernel
        for source in Path(ahead.__file__).parent.glob("*.py")
        for kernel in re.findall(r"\blaunch\(\s*(\w+),", source.read_text())
    }
    assert len(launched) > 10
    assert {done["kernel"] for done in shipped.figures} == launched


def test_attention_in_16_bits_multiplies_on_tensor_cores(shipped: Checked) -> None:
    for done in shipped.figures:
        if done["kernel"] in ATTENTION and "float32" not in done["variant"]:
            used = done["resources"]
            assert used["wgmma"] + used["mma"] > 0, done["variant"]
            if done["kernel"] == "_paged_extend" and done["architecture"] == "sm_90":
                assert used["wgmma"] > 0, done["variant"]


def test_attention_reads_the_cache_16_bytes_at_a_time(shipped: Checked) -> None:
    """K and V of heads of any size, and in 8 bits, too: a lost hint of alignment would make it one number at a time."""
    for done in shipped.figures:
        if done["kernel"] in ATTENTION:
            assert done["resources"]["wide_loads"] >= 4, done["variant"]


@pytest.mark.long
def test_the_full_product_of_options_is_in_order(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "--full")
    assert checked.figures, checked.errors
    assert checked.exit_code == 0, checked.output[checked.output.index(" not in order") :]
