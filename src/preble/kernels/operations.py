"""The kernels as one set: Triton's, or their references in plain PyTorch, which run anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from preble.kernels.add_norm import add_norm, add_norm_reference
from preble.kernels.merge import merge_partials, merge_partials_reference
from preble.kernels.paged_decode import paged_decode, paged_decode_reference
from preble.kernels.paged_extend import paged_extend, paged_extend_reference
from preble.kernels.prepare import (
    prepare_inputs,
    prepare_inputs_reference,
    update_tables,
    update_tables_reference,
)
from preble.kernels.rotate_and_store import rotate_and_store, rotate_and_store_reference
from preble.kernels.sampling import sample, sample_reference
from preble.kernels.sampling_rows import SamplingRows
from preble.kernels.shared_prefix import (
    plan_shared_splits,
    plan_shared_splits_reference,
    shared_prefix_decode,
    shared_prefix_decode_reference,
)
from preble.kernels.silu_mul import silu_mul, silu_mul_reference
from preble.kernels.splits import plan_splits, plan_splits_reference
from preble.kernels.store_kv import store_kv, store_kv_reference

Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Operations:
    """What a forward pass and its sampling are made of; each is documented where it is defined."""

    name: str
    capturable: bool
    """Whether CUDA graphs may hold them."""
    add_norm: Kernel
    merge_partials: Kernel
    paged_decode: Kernel
    paged_extend: Kernel
    plan_shared_splits: Kernel
    plan_splits: Kernel
    prepare_inputs: Kernel
    rotate_and_store: Kernel
    sample: Kernel
    shared_prefix_decode: Kernel
    silu_mul: Kernel
    store_kv: Kernel
    update_tables: Kernel
    write_sampling_rows: Kernel


TRITON = Operations(
    "triton",
    capturable=True,
    add_norm=add_norm,
    merge_partials=merge_partials,
    paged_decode=paged_decode,
    paged_extend=paged_extend,
    plan_shared_splits=plan_shared_splits,
    plan_splits=plan_splits,
    prepare_inputs=prepare_inputs,
    rotate_and_store=rotate_and_store,
    sample=sample,
    shared_prefix_decode=shared_prefix_decode,
    silu_mul=silu_mul,
    store_kv=store_kv,
    update_tables=update_tables,
    write_sampling_rows=SamplingRows.write,
)
"""For GPUs; on the CPU they run in Triton's interpreter, if that was chosen before Triton was imported."""

REFERENCE = Operations(
    "torch",
    capturable=False,
    add_norm=add_norm_reference,
    merge_partials=merge_partials_reference,
    paged_decode=paged_decode_reference,
    paged_extend=paged_extend_reference,
    plan_shared_splits=plan_shared_splits_reference,
    plan_splits=plan_splits_reference,
    prepare_inputs=prepare_inputs_reference,
    rotate_and_store=rotate_and_store_reference,
    sample=sample_reference,
    shared_prefix_decode=shared_prefix_decode_reference,
    silu_mul=silu_mul_reference,
    store_kv=store_kv_reference,
    update_tables=update_tables_reference,
    write_sampling_rows=SamplingRows.write_reference,
)
"""For comparison: slow, and they wait for the device, so no CUDA graph can hold them."""
