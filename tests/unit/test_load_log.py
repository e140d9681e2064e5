"""What llama-server's log says of its memory, with what it really printed."""

# ruff: noqa: E501 - lines of logs as they are

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core import load_log
from supervisor_synapse.core.load_log import Loaded, is_on_host, parse_dry_run, parse_load
from supervisor_synapse.core.model import Part
from tests.unit.builders import MIB

START = "synapse-run: start: pid=4711, at=2026-01-31T12:00:00Z\n"

# A model with a sliding window, over two RPC servers: `-c 16384 -ts 1,1`.
TWO_DEVICES = """\
0.00.011.227 I cmn  common_param: device_info:
0.00.011.244 I cmn  common_param:   - CPU     : Intel(R) Xeon(R) Processor (24105 MiB, 24105 MiB free)
0.00.011.375 I cmn  common_param:   - RPC0    : 127.0.0.1:50971 (24105 MiB, 24105 MiB free)
0.00.011.493 I cmn  common_param:   - RPC1    : 127.0.0.1:50972 (24105 MiB, 24105 MiB free)
0.00.015.012 I srv    load_model: loading model 'gemma.gguf'
0.00.015.051 I cmn  common_init_: fitting params to device memory ...
0.00.015.074 I common_params_fit_impl: getting device memory data for initial parameters:
0.00.053.444 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.053.468 I common_memory_breakdown_print: |   - RPC0 (127.0.0.1:50971) | 24105 = 24105 + (  46 =    12 +       7 +      26) +         -46 |
0.00.053.526 I common_memory_breakdown_print: |   - RPC1 (127.0.0.1:50972) | 24105 = 24105 + (  50 =    18 +       6 +      25) +         -50 |
0.00.053.535 I common_memory_breakdown_print: |   - Host                   |                    29 =     9 +       0 +      19                |
0.00.054.624 I common_params_fit_impl: projected memory use with initial parameters [MiB]:
0.00.054.644 I common_params_fit_impl:   - RPC0 (127.0.0.1:50971):  24105 total,     46 used,  24059 free vs. target of   1024
0.00.054.666 I common_params_fit_impl: targets for free memory can be met on all devices, no changes needed
0.00.054.682 I common_fit_params: fitting params to free memory took 0.04 seconds
0.00.081.561 I print_info: no_alloc              = 0
0.00.082.012 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.087.446 I load_tensors: offloaded 13/13 layers to GPU
0.00.087.456 I load_tensors:   CPU_Mapped model buffer size =     9.89 MiB
0.00.087.464 I load_tensors: RPC0[127.0.0.1:50971] model buffer size =    12.72 MiB
0.00.087.471 I load_tensors: RPC0[127.0.0.1:50972] model buffer size =    18.98 MiB
0.00.133.505 I llama_context: constructing llama_context
0.00.133.565 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.133.869 I llama_kv_cache: RPC0[127.0.0.1:50971] KV buffer size =     4.00 MiB
0.00.139.599 I llama_kv_cache: RPC0[127.0.0.1:50972] KV buffer size =     4.00 MiB
0.00.141.460 I llama_kv_cache: RPC0[127.0.0.1:50971] KV buffer size =     3.75 MiB
0.00.143.312 I llama_kv_cache: RPC0[127.0.0.1:50972] KV buffer size =     2.50 MiB
0.00.150.700 I sched_reserve: RPC0[127.0.0.1:50971] compute buffer size =    26.02 MiB
0.00.150.719 I sched_reserve: RPC0[127.0.0.1:50972] compute buffer size =    26.02 MiB
0.00.150.727 I sched_reserve:        CPU compute buffer size =    19.52 MiB
0.00.163.499 I srv    load_model: initializing, n_slots = 4, n_ctx_slot = 16384, kv_unified = 'true'
"""

# 16 experts a layer, those of four layers kept on the host: `-ngl 99 -ncmoe 4`. Without mmap the
# buffer on the host has 115.78 MiB.
EXPERTS_ON_HOST = """\
0.00.013.057 I cmn  common_param:   - RPC0    : 127.0.0.1:50971 (24105 MiB, 24105 MiB free)
0.00.018.447 I srv    load_model: loading model 'bigmoe.gguf'
0.00.018.497 I cmn  common_init_: fitting params to device memory ...
0.00.018.521 I common_params_fit_impl: getting device memory data for initial parameters:
0.00.115.504 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.115.511 I common_memory_breakdown_print: |   - RPC0 (127.0.0.1:50971) | 24105 = 24105 + ( 154 =   125 +      16 +      12) +        -154 |
0.00.115.512 I common_memory_breakdown_print: |   - Host                   |                   124 =   115 +       0 +       9                |
0.00.116.824 I common_params_fit_impl: projected to use 154 MiB of device memory vs. 24105 MiB of free device memory
0.00.116.825 I common_params_fit_impl: will leave 23951 >= 1024 MiB of free device memory, no changes needed
0.00.116.829 I common_fit_params: fitting params to free memory took 0.10 seconds
0.00.182.117 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.185.730 I load_tensors: offloaded 9/9 layers to GPU
0.00.185.735 I load_tensors:   CPU_Mapped model buffer size =   120.86 MiB
0.00.185.736 I load_tensors: RPC0[127.0.0.1:50971] model buffer size =   125.95 MiB
0.00.583.603 I llama_context: constructing llama_context
0.00.583.649 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.594.764 I llama_kv_cache: RPC0[127.0.0.1:50971] KV buffer size =    16.00 MiB
0.00.624.320 I sched_reserve: RPC0[127.0.0.1:50971] compute buffer size =    12.07 MiB
0.00.624.364 I sched_reserve:        CPU compute buffer size =     9.01 MiB
"""

# Q4_0 on the host: most of it is copied into another layout. `-dev none`, and yet "offloaded".
REPACKED = """\
0.00.009.639 I srv    load_model: loading model 'q4.gguf'
0.00.009.684 I cmn  common_init_: fitting params to device memory ...
0.00.009.708 I common_params_fit_impl: getting device memory data for initial parameters:
0.00.044.174 I common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
0.00.044.179 I common_memory_breakdown_print: |   - Host               |                   63 =    11 +      32 +      20                |
0.00.044.180 I common_memory_breakdown_print: |   - CPU_REPACK         |                   16 =    16 +       0 +       0                |
0.00.045.400 I common_params_fit_impl: projected to use 63 MiB of host memory vs. 24105 MiB of total host memory
0.00.045.417 I common_params_fit_impl: will leave 24042 >= 1024 MiB of system memory, no changes needed
0.00.045.420 I common_fit_params: fitting params to free memory took 0.04 seconds
0.00.074.802 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.076.184 I load_tensors: offloaded 9/9 layers to GPU
0.00.076.186 I load_tensors:   CPU_Mapped model buffer size =    28.04 MiB
0.00.076.187 I load_tensors:   CPU_REPACK model buffer size =    16.88 MiB
0.00.102.891 I llama_context: constructing llama_context
0.00.102.937 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.103.000 I llama_kv_cache:        CPU KV buffer size =    32.00 MiB
0.00.129.743 I sched_reserve:        CPU compute buffer size =    20.01 MiB
"""

# A model on RPC0 and its draft on RPC1, at verbosity 5: dry loads print as real ones do.
DRAFT = """\
0.00.016.497 I cmn  common_param:   - RPC0    : 127.0.0.1:50971 (24105 MiB, 24105 MiB free)
0.00.016.609 I cmn  common_param:   - RPC1    : 127.0.0.1:50972 (24105 MiB, 24105 MiB free)
0.00.018.581 I srv    load_model: loading model 'mid.gguf'
0.00.096.459 D print_info: no_alloc              = 1
0.00.096.834 D load_tensors: loading model tensors, this can take a while... (load_mode = none)
0.00.098.171 D load_tensors: offloaded 3/3 layers to GPU
0.00.098.184 D load_tensors:          CPU model buffer size =     0.00 MiB
0.00.098.191 D load_tensors: RPC0[127.0.0.1:50972] model buffer size =     0.00 MiB
0.00.098.351 D llama_context: constructing llama_context
0.00.098.600 D llama_context:        CPU  output buffer size =     0.31 MiB
0.00.098.730 D llama_kv_cache: RPC0[127.0.0.1:50972] KV buffer size =     0.00 MiB
0.00.102.929 D sched_reserve: RPC0[127.0.0.1:50972] compute buffer size =     5.01 MiB
0.00.102.937 D sched_reserve:        CPU compute buffer size =     4.51 MiB
0.00.103.204 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.103.213 I common_memory_breakdown_print: |   - RPC1 (127.0.0.1:50972) | 24105 = 24105 + (  12 =     5 +       2 +       5) +         -12 |
0.00.103.220 I common_memory_breakdown_print: |   - Host                   |                     9 =     4 +       0 +       4                |
0.00.104.131 I srv    load_model: [spec] estimated memory usage of draft model is 12.24 MiB
0.00.104.169 I cmn  common_init_: fitting params to device memory ...
0.00.104.188 I common_params_fit_impl: getting device memory data for initial parameters:
0.00.132.541 I print_info: no_alloc              = 1
0.00.132.669 I load_tensors: loading model tensors, this can take a while... (load_mode = none)
0.00.135.585 I load_tensors: offloaded 17/17 layers to GPU
0.00.135.587 I load_tensors:          CPU model buffer size =     0.00 MiB
0.00.135.587 I load_tensors: RPC0[127.0.0.1:50971] model buffer size =     0.00 MiB
0.00.135.669 I llama_context: constructing llama_context
0.00.135.695 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.135.764 I llama_kv_cache: RPC0[127.0.0.1:50971] KV buffer size =     0.00 MiB
0.00.142.393 I sched_reserve: RPC0[127.0.0.1:50971] compute buffer size =    19.01 MiB
0.00.142.401 I sched_reserve:        CPU compute buffer size =     6.01 MiB
0.00.142.652 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.142.661 I common_memory_breakdown_print: |   - RPC0 (127.0.0.1:50971) | 24105 = 24105 + ( 222 =   139 +      64 +      19) +        -222 |
0.00.142.667 I common_memory_breakdown_print: |   - Host                   |                    25 =    19 +       0 +       6                |
0.00.143.524 I common_params_fit_impl: projected to use 222 MiB of device memory vs. 24105 MiB of free device memory
0.00.143.539 I common_params_fit_impl: will leave 23882 >= 1024 MiB of free device memory, no changes needed
0.00.143.555 I common_fit_params: fitting params to free memory took 0.04 seconds
0.00.173.242 I print_info: no_alloc              = 0
0.00.173.752 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.183.347 I load_tensors: offloaded 17/17 layers to GPU
0.00.183.357 I load_tensors:   CPU_Mapped model buffer size =    19.78 MiB
0.00.183.366 I load_tensors: RPC0[127.0.0.1:50971] model buffer size =   139.85 MiB
0.00.358.352 I llama_context: constructing llama_context
0.00.358.621 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.373.458 I llama_kv_cache: RPC0[127.0.0.1:50971] KV buffer size =    64.00 MiB
0.00.417.672 I sched_reserve: RPC0[127.0.0.1:50971] compute buffer size =    19.01 MiB
0.00.417.691 I sched_reserve:        CPU compute buffer size =     6.01 MiB
0.00.417.871 I common_speculative_init_result: loading draft model 'draft.gguf'
0.00.445.708 I print_info: no_alloc              = 0
0.00.446.242 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.447.416 I load_tensors: offloaded 3/3 layers to GPU
0.00.447.419 I load_tensors:   CPU_Mapped model buffer size =     4.95 MiB
0.00.447.419 I load_tensors: RPC0[127.0.0.1:50972] model buffer size =     5.23 MiB
0.00.453.204 I llama_context: constructing llama_context
0.00.453.364 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.455.656 I llama_kv_cache: RPC0[127.0.0.1:50972] KV buffer size =     2.00 MiB
0.00.458.912 I sched_reserve: RPC0[127.0.0.1:50972] compute buffer size =     5.01 MiB
0.00.458.926 I sched_reserve:        CPU compute buffer size =     4.51 MiB
0.00.495.210 I srv    load_model: initializing, n_slots = 4, n_ctx_slot = 4096, kv_unified = 'true'
"""

# A projector beside a model on RPC1: the engine puts it onto its first device. Verbosity 5.
PROJECTOR = """\
0.00.012.466 I cmn  common_param:   - RPC0    : 127.0.0.1:50971 (24105 MiB, 24105 MiB free)
0.00.012.581 I cmn  common_param:   - RPC1    : 127.0.0.1:50972 (24105 MiB, 24105 MiB free)
0.00.014.432 I srv    load_model: loading model 'gemma.gguf'
0.00.017.898 I srv    load_model: [mtmd] estimated worst-case memory usage of mmproj is 2.73 MiB (took 3.38 ms)
0.00.017.919 D srv    load_model: [mtmd] adding 2.73 MiB to fit_params_target for device RPC0
0.00.017.940 I cmn  common_init_: fitting params to device memory ...
0.00.057.837 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.057.852 I common_memory_breakdown_print: |   - RPC1 (127.0.0.1:50972) | 24105 = 24105 + (  53 =    31 +       8 +      14) +         -53 |
0.00.057.852 I common_memory_breakdown_print: |   - Host                   |                    17 =     9 +       0 +       7                |
0.00.058.858 I common_params_fit_impl: projected to use 53 MiB of device memory vs. 24105 MiB of free device memory
0.00.058.881 I common_fit_params: fitting params to free memory took 0.04 seconds
0.00.083.466 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.086.642 I load_tensors: offloaded 13/13 layers to GPU
0.00.086.645 I load_tensors:   CPU_Mapped model buffer size =     9.89 MiB
0.00.086.646 I load_tensors: RPC0[127.0.0.1:50972] model buffer size =    31.69 MiB
0.00.131.971 I llama_context: constructing llama_context
0.00.132.033 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.134.435 I llama_kv_cache: RPC0[127.0.0.1:50972] KV buffer size =     2.00 MiB
0.00.134.877 I llama_kv_cache: RPC0[127.0.0.1:50972] KV buffer size =     6.25 MiB
0.00.146.668 I sched_reserve: RPC0[127.0.0.1:50972] compute buffer size =    14.02 MiB
0.00.146.672 I sched_reserve:        CPU compute buffer size =     7.52 MiB
0.00.147.132 I clip_ctx: CLIP using RPC0[127.0.0.1:50971] backend
0.00.147.524 I load_hparams: model size:         1.29 MiB
0.00.166.505 I reserve_compute_meta: RPC0[127.0.0.1:50971] compute buffer size =     0.86 MiB
0.00.166.533 I reserve_compute_meta:        CPU compute buffer size =     0.57 MiB
0.00.174.577 I srv    load_model: initializing, n_slots = 4, n_ctx_slot = 4096, kv_unified = 'true'
"""

# An adapter: the context is laid out twice. Recurrent layers, without colour, time and level.
ADAPTER = """\
load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
load_tensors: offloaded 3/3 layers to GPU
load_tensors:   CPU_Mapped model buffer size =     0.04 MiB
load_tensors:      CUDA0 model buffer size =     0.11 MiB
llama_adapter_lora_init_impl:      CUDA0 LoRA buffer size =     2.00 MiB
llama_context: constructing llama_context
llama_context:  CUDA_Host  output buffer size =     0.01 MiB
llama_kv_cache:      CUDA0 KV buffer size =     0.12 MiB
llama_memory_recurrent:      CUDA0 RS buffer size =     0.30 MiB
sched_reserve:      CUDA0 compute buffer size =     1.01 MiB
sched_reserve:  CUDA_Host compute buffer size =     0.76 MiB
sched_reserve:      CUDA0 compute buffer size =     1.02 MiB
sched_reserve:  CUDA_Host compute buffer size =     0.76 MiB
"""

# Builds of 2024.
OLD = """\
llm_load_tensors: offloaded 41/41 layers to GPU
llm_load_tensors:        CPU buffer size =  1640.62 MiB
llm_load_tensors:      CUDA0 buffer size =  5434.38 MiB
llm_load_tensors:      CUDA1 buffer size = 13989.53 MiB
llama_kv_cache_init:      CUDA0 KV buffer size =  1536.00 MiB
llama_kv_cache_init:      CUDA1 KV buffer size =  3584.00 MiB
llama_new_context_with_model:  CUDA_Host  output buffer size =     1.95 MiB
llama_new_context_with_model:      CUDA0 compute buffer size =   672.01 MiB
llama_new_context_with_model:      CUDA1 compute buffer size =   672.02 MiB
llama_new_context_with_model:  CUDA_Host compute buffer size =    62.63 MiB
"""

# `--split-mode tensor`.
TENSOR_SPLIT = """\
0.00.011.253 I cmn  common_init_: fitting params to device memory ...
0.00.011.297 W common_fit_params: failed to fit params to free device memory: llama_params_fit is not implemented for SPLIT_MODE_TENSOR, abort
0.00.011.317 I common_fit_params: fitting params to free memory took 0.00 seconds
0.00.054.905 I load_tensors: offloaded 17/17 layers to GPU
0.00.054.918 I load_tensors:   CPU_Mapped model buffer size =    19.78 MiB
0.00.054.926 I load_tensors:       Meta() model buffer size =    69.96 MiB
0.00.242.865 I llama_kv_cache:     Meta() KV buffer size =    32.00 MiB
0.00.295.964 I sched_reserve:     Meta() compute buffer size =    19.01 MiB
0.00.295.985 I sched_reserve:        CPU compute buffer size =     6.01 MiB
"""

FAILED_FIT = """\
0.00.012.577 I cmn  common_init_: fitting params to device memory ...
0.00.012.587 I common_params_fit_impl: getting device memory data for initial parameters:
0.00.044.302 E common_fit_params: encountered an error while trying to fit params to free device memory: failed to load model
0.00.044.319 I common_fit_params: fitting params to free memory took 0.03 seconds
"""

# 105 MiB are left: a table for each try, and the load has other arguments than were given.
REDUCED = """\
0.00.014.667 I cmn  common_init_: fitting params to device memory ...
0.00.052.818 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.052.851 I common_memory_breakdown_print: |   - RPC0 (127.0.0.1:50971) | 24105 = 24105 + ( 222 =   139 +      64 +      19) +        -222 |
0.00.052.851 I common_memory_breakdown_print: |   - Host                   |                    25 =    19 +       0 +       6                |
0.00.053.848 I common_params_fit_impl: projected to use 222 MiB of device memory vs. 24105 MiB of free device memory
0.00.053.876 I common_params_fit_impl: cannot meet free memory target of 24000 MiB, need to reduce device memory by 117 MiB
0.00.229.018 I common_memory_breakdown_print: | memory breakdown [MiB]     | total    free    self   model   context   compute    unaccounted |
0.00.229.035 I common_memory_breakdown_print: |   - RPC0 (127.0.0.1:50971) | 24105 = 24105 + (  95 =    57 +      20 +      18) +         -95 |
0.00.229.036 I common_memory_breakdown_print: |   - Host                   |                   166 =   102 +      44 +      20                |
0.00.229.861 I common_fit_params: fitting params to free memory took 0.22 seconds
0.00.268.000 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.268.030 I load_tensors: offloaded 6/17 layers to GPU
0.00.268.034 I load_tensors:   CPU_Mapped model buffer size =   102.33 MiB
0.00.268.035 I load_tensors: RPC0[127.0.0.1:50971] model buffer size =    57.31 MiB
0.00.363.957 I llama_context:        CPU  output buffer size =     0.31 MiB
0.00.364.056 I llama_kv_cache:        CPU KV buffer size =    44.00 MiB
0.00.384.495 I llama_kv_cache: RPC0[127.0.0.1:50971] KV buffer size =    20.00 MiB
0.00.394.784 I sched_reserve: RPC0[127.0.0.1:50971] compute buffer size =    18.01 MiB
0.00.394.800 I sched_reserve:        CPU compute buffer size =    20.01 MiB
"""

NOTHING_OFFLOADED = """\
0.00.082.935 I load_tensors: offloading 0 repeating layers to GPU
0.00.082.950 I load_tensors: offloaded 0/13 layers to GPU
0.00.082.953 I load_tensors:   CPU_Mapped model buffer size =    41.58 MiB
0.00.083.816 I llama_kv_cache:        CPU KV buffer size =     2.00 MiB
0.00.111.719 I sched_reserve:        CPU compute buffer size =    14.52 MiB
"""

# As another backend prints what the engine moves to the device for a while.
OP_OFFLOAD = NOTHING_OFFLOADED + "sched_reserve:      CUDA0 compute buffer size =   301.00 MiB\n"


def mib(figure: float) -> int:
    return round(figure * MIB)


def part(device: str, weights: float, kv: float, recurrent: float, compute: float) -> Part:
    """A part in MiB."""
    return Part(device, mib(weights), mib(kv), mib(recurrent), mib(compute))


def assert_near(found: Loaded | None, expected: list[Part]) -> None:
    """All figures within the rounding of a sum."""
    assert found is not None
    assert [one.device for one in found.parts] == [one.device for one in expected]
    for one, other in zip(found.parts, expected, strict=True):
        assert one.weights_bytes == pytest.approx(other.weights_bytes, abs=2), one
        assert one.kv_bytes == pytest.approx(other.kv_bytes, abs=2), one
        assert one.recurrent_bytes == pytest.approx(other.recurrent_bytes, abs=2), one
        assert one.compute_bytes == pytest.approx(other.compute_bytes, abs=2), one
        assert one.overhead_bytes == 0


# --- a real load ----------------------------------------------------------------------------------


def test_two_rpc_servers_are_two_devices_though_their_buffers_have_one_name() -> None:
    """Caches with and without a window add up; tables and the dry fit are not counted."""
    found = parse_load(TWO_DEVICES)
    assert_near(
        found,
        [
            part("RPC0", 12.72, 7.75, 0, 26.02),
            part("RPC1", 18.98, 6.50, 0, 26.02),
            part("CPU", 9.89, 0, 0, 0.31 + 19.52),
        ],
    )
    assert found is not None
    assert (found.offloaded, found.layers) == (13, 13)


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("llama_prepare_model_devices: using device RPC3 (127.0.0.1:50972) (unknown id) - 9 MiB free\n", "RPC3"),
        ("llama_model_load_from_file_impl: using device RPC1 (127.0.0.1:50972) - 9 MiB free\n", "RPC1"),
        ("", "RPC0[127.0.0.1:50972]"),
    ],
)  # fmt: skip
def test_a_remote_buffer_is_named_as_the_list_of_devices_has_it(listed: str, name: str) -> None:
    """Without a list nobody can tell; then it is no device that anyone knows."""
    text = listed + ADAPTER.replace("CUDA0", "RPC0[127.0.0.1:50972]")
    found = parse_load(text)
    assert found is not None
    assert [one.device for one in found.parts] == [name, "CPU"]


def test_the_second_device_of_one_rpc_server_is_found() -> None:
    devices = "".join(
        f"cmn  common_param:   - RPC{n}    : host:50052 (9 MiB, 9 MiB free)\n" for n in range(3)
    )
    found = parse_load(devices + ADAPTER.replace("CUDA0", "RPC2[host:50052]"))
    assert found is not None
    assert found.on("RPC2") == mib(0.11) + mib(2) + mib(0.12) + mib(0.30) + mib(1.02)


def test_what_is_mapped_between_the_hosts_tensors_does_not_count() -> None:
    """The span has 120.86 MiB, the tensors in it 115.78: the dry fit says 115 and a fraction."""
    assert_near(
        parse_load(EXPERTS_ON_HOST),
        [part("RPC0", 125.95, 16, 0, 12.07), part("CPU", 116, 0, 0, 9.32)],
    )


def test_weights_that_were_copied_into_another_layout_count_once() -> None:
    """28.04 MiB stay mapped, of which the fit needs 11 and a fraction, beside 16.88 of copies."""
    assert_near(parse_load(REPACKED), [part("CPU", 12 + 17, 32, 0, 20.32)])


@pytest.mark.parametrize("cut", ["fitting params to device memory", "no changes needed"])
def test_where_no_dry_fit_vouches_for_less_the_whole_span_counts(cut: str) -> None:
    text = "".join(line for line in REPACKED.splitlines(True) if cut not in line)
    assert_near(parse_load(text), [part("CPU", 28.04 + 16.88, 32, 0, 20.32)])


def test_a_draft_is_included_and_its_layers_are_not_the_models() -> None:
    """Its dry load, outside of the fit, is not counted either."""
    found = parse_load(DRAFT)
    assert_near(
        found,
        [
            part("RPC0", 139.85, 64, 0, 19.01),
            part("RPC1", 5.23, 2, 0, 5.01),
            part("CPU", 19.78 + 4.95, 0, 0, 0.31 + 6.01 + 0.31 + 4.51),
        ],
    )
    assert found is not None
    assert (found.offloaded, found.layers) == (17, 17)


def test_a_projector_lies_where_its_own_line_says() -> None:
    assert_near(
        parse_load(PROJECTOR),
        [
            part("RPC1", 31.69, 8.25, 0, 14.02),
            part("RPC0", 1.29, 0, 0, 0.86),
            part("CPU", 9.89, 0, 0, 0.31 + 7.52 + 0.57),
        ],
    )


def test_a_context_that_is_laid_out_twice_has_one_scratch() -> None:
    """An adapter counts as weights, the state of recurrent layers by itself, pinned as host."""
    assert_near(
        parse_load(ADAPTER),
        [part("CUDA0", 0.11 + 2, 0.12, 0.30, 1.02), part("CPU", 0.04, 0, 0, 0.77)],
    )


def test_builds_of_2024_are_read() -> None:
    found = parse_load(OLD)
    assert_near(
        found,
        [
            part("CUDA0", 5434.38, 1536, 0, 672.01),
            part("CUDA1", 13989.53, 3584, 0, 672.02),
            part("CPU", 1640.62, 0, 0, 1.95 + 62.63),
        ],
    )
    assert found is not None
    assert (found.offloaded, found.layers) == (41, 41)


@pytest.mark.parametrize(
    ("printed", "device"),
    [
        ("CUDA0", "CUDA0"), ("Vulkan1", "Vulkan1"), ("ROCm0", "ROCm0"), ("MTL0_Mapped", "MTL0"),
        ("MTL0_Private", "MTL0"), ("Metal_Mapped", "Metal"), ("CUDA_Host", "CPU"),
        ("Vulkan_Host", "CPU"), ("ROCm_Host", "CPU"), ("CPU_REPACK", "CPU"), ("AMX", "CPU"),
        ("CPU_AARCH64", "CPU"), ("CPU_Mapped", "CPU"),
    ],
)  # fmt: skip
def test_each_backends_buffers_are_known(printed: str, device: str) -> None:
    text = f"load_tensors: {printed} model buffer size = 5.00 MiB\nx: CPU compute buffer size = 0.00 MiB"
    assert parse_load(text) == Loaded((Part(device, weights_bytes=5 * MIB),), None, None)


@pytest.mark.parametrize("name", ["CUDA0_Split", "CUDA_Split"])
def test_buffers_that_devices_share_tell_nothing_of_a_device(name: str) -> None:
    assert parse_load(ADAPTER.replace("CUDA0", name)) is None
    assert parse_load(TENSOR_SPLIT) is None


def test_colours_do_not_matter() -> None:
    line = "\x1b[34m0.00.186\x1b[0m \x1b[32mI \x1b[0mload_tensors: CUDA0 model buffer size = 5.00 MiB\n"
    found = parse_load(line + "sched_reserve: CPU compute buffer size = 1.00 MiB")
    assert found is not None
    assert found.on("CUDA0") == 5 * MIB


def test_the_last_run_counts() -> None:
    found = parse_load(START + OLD + START + ADAPTER)
    assert found == parse_load(ADAPTER)


def test_a_run_that_has_not_loaded_yet_tells_nothing_of_the_one_before() -> None:
    assert parse_load(START + OLD + START + "load_tensors: loading model tensors\n") is None


def test_a_model_that_woke_has_loaded_once() -> None:
    """The same process loads again, and prints it all again."""
    slept = "0.01.123 I srv  handle_sleep: server is entering sleeping state\n"
    once = parse_load(START + DRAFT)
    assert once is not None
    assert parse_load(START + DRAFT + slept + DRAFT[DRAFT.index("0.00.018.581") :]) == once


def test_half_a_load_tells_nothing() -> None:
    """Whatever is printed last, the scratch is missing."""
    lines = ADAPTER.splitlines(True)
    for length in range(9):
        assert parse_load("".join(lines[:length])) is None


@pytest.mark.parametrize("text", ["", "\n\n", "main: server is listening", FAILED_FIT])
def test_a_log_that_says_nothing_of_memory_tells_nothing(text: str) -> None:
    assert parse_load(text) is None
    assert parse_dry_run(text) is None
    assert is_on_host(text) == ""


# --- a dry run ------------------------------------------------------------------------------------


def test_the_table_of_a_dry_fit_is_read_and_rounded_up() -> None:
    assert_near(
        parse_dry_run(TWO_DEVICES),
        [part("RPC0", 14, 7, 0, 26), part("RPC1", 20, 6, 0, 25), part("CPU", 11, 0, 0, 19)],
    )


@pytest.mark.parametrize("text", [TWO_DEVICES, EXPERTS_ON_HOST, REPACKED, DRAFT, PROJECTOR])
def test_a_dry_fit_agrees_with_its_load_to_three_mebibytes_a_device(text: str) -> None:
    real, dry = parse_load(text), parse_dry_run(text)
    assert real is not None
    assert dry is not None
    for device in {one.device for one in real.parts}:
        assert abs(real.on(device) - dry.on(device)) <= 3 * MIB, device


def test_at_verbosity_5_the_scratch_is_exact_and_a_draft_is_included() -> None:
    found = parse_dry_run(DRAFT)
    assert_near(
        found,
        [
            part("RPC1", 13 - 2 - 5.01, 2, 0, 5.01),
            part("RPC0", 223 - 64 - 19.01, 64, 0, 19.01),
            part("CPU", 10 - 4.51 + 26 - 6.01, 0, 0, 0.31 + 4.51 + 0.31 + 6.01),
        ],
    )
    assert found is not None
    assert (found.offloaded, found.layers) == (17, 17)


def test_a_projector_is_counted_on_its_own_device() -> None:
    found = parse_dry_run(PROJECTOR)
    assert found is not None
    assert found.on("RPC0") == mib(2.73)
    assert found.on("RPC1") == 54 * MIB


def test_a_projector_without_a_device_is_counted_on_the_models_first() -> None:
    """As at verbosity 4."""
    text = "".join(line for line in PROJECTOR.splitlines(True) if "adding" not in line)
    found = parse_dry_run(text)
    assert found is not None
    assert found.on("RPC1") == 54 * MIB + mib(2.73)


def test_weights_that_a_draft_shares_with_its_model_count_once() -> None:
    """A context for multi-token prediction: its table names the model's weights again."""
    text = DRAFT.replace("draft model is 12.24 MiB", "MTP context is 7.01 MiB")
    found = parse_dry_run(text)
    assert found is not None
    assert found.on("RPC1") == 8 * MIB
    assert found.on("CPU") == (26 + 9 - 4 + 1) * MIB + 2 * mib(0.31)


def test_only_the_first_try_is_of_the_arguments_as_given() -> None:
    dry, real = parse_dry_run(REDUCED), parse_load(REDUCED.replace("RPC0[127.0.0.1:50971]", "RPC0"))
    assert dry is not None
    assert real is not None
    assert (dry.on("RPC0"), dry.on("CPU")) == (223 * MIB, 26 * MIB)
    assert (real.offloaded, real.layers) == (6, 17)
    assert real.on("CPU") == mib(102.33) + mib(0.31) + mib(44) + mib(20.01)


def test_a_table_that_is_not_all_there_tells_nothing() -> None:
    lines = TWO_DEVICES.splitlines(True)
    projected = next(n for n, line in enumerate(lines) if "projected" in line)
    for length in range(projected):
        assert parse_dry_run("".join(lines[:length])) is None
    assert parse_dry_run("".join(lines[: projected + 1])) == parse_dry_run(TWO_DEVICES)


def test_what_cannot_be_fitted_tells_nothing() -> None:
    assert parse_dry_run(TENSOR_SPLIT) is None
    assert parse_dry_run(FAILED_FIT) is None


def test_a_device_may_be_described_by_anything() -> None:
    """Bars, brackets and figures in a description do not shift the columns."""
    text = TWO_DEVICES.replace("RPC0 (127.0.0.1:50971) |", "RPC0 (a | 9 = 9 + 9 + 9 |) |")
    assert parse_dry_run(text) == parse_dry_run(TWO_DEVICES)


@pytest.mark.parametrize(
    "text", [TWO_DEVICES, EXPERTS_ON_HOST, REPACKED, DRAFT, PROJECTOR, REDUCED]
)
def test_the_line_that_ends_a_dry_run_has_all_before_it(text: str) -> None:
    lines = text.splitlines(True)
    last = next(n for n, line in enumerate(lines) if load_log.ends_dry_run(line))
    found = parse_dry_run("".join(lines[: last + 1]))
    assert found is not None
    assert found == parse_dry_run(text)


def test_a_fit_that_fails_ends_a_dry_run_too() -> None:
    assert any(map(load_log.ends_dry_run, FAILED_FIT.splitlines()))
    assert any(map(load_log.ends_dry_run, TENSOR_SPLIT.splitlines()))


# --- asked onto a device, and on the host ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (NOTHING_OFFLOADED, "load_tensors: offloaded 0/13 layers to GPU"),
        (OP_OFFLOAD, "load_tensors: offloaded 0/13 layers to GPU"),
        (REPACKED, "load_tensors: CPU_Mapped model buffer size = 28.04 MiB"),
        (
            "0.00.001 W warn: no usable GPU found, --gpu-layers option will be ignored\n" + REPACKED[:900],
            "",
        ),
        (
            "0.00.009.639 I srv    load_model: loading model 'q4.gguf'\n"
            "0.00.001 W warn: no usable GPU found, --gpu-layers option will be ignored\n",
            "warn: no usable GPU found, --gpu-layers option will be ignored",
        ),
        (START + OLD + START + NOTHING_OFFLOADED, "load_tensors: offloaded 0/13 layers to GPU"),
    ],
)  # fmt: skip
def test_a_load_onto_the_host_is_shown_by_a_line(text: str, line: str) -> None:
    """Also where the engine claims that all layers were offloaded: to no device."""
    assert is_on_host(text) == line


@pytest.mark.parametrize(
    "text", [TWO_DEVICES, EXPERTS_ON_HOST, DRAFT, PROJECTOR, ADAPTER, OLD, TENSOR_SPLIT, REDUCED,
             START + NOTHING_OFFLOADED + START + ADAPTER],
)  # fmt: skip
def test_a_load_onto_a_device_is_not_taken_for_one_onto_the_host(text: str) -> None:
    """Also where only some layers are there."""
    assert is_on_host(text) == ""


def test_a_load_that_is_under_way_may_still_come_onto_a_device() -> None:
    lines = NOTHING_OFFLOADED.splitlines(True)
    assert is_on_host("".join(lines[:-1])) == ""


def test_a_draft_on_a_device_does_not_hide_a_model_on_the_host() -> None:
    main, draft = DRAFT.split("common_speculative_init_result")
    text = main.replace("RPC0[127.0.0.1:50971]", "CPU").replace("17/17", "0/17") + "x" + draft
    assert is_on_host(text) == "load_tensors: offloaded 0/17 layers to GPU"


# --- text from outside ----------------------------------------------------------------------------

_PIECES = st.sampled_from(
    [*DRAFT.splitlines(), *PROJECTOR.splitlines(), *REDUCED.splitlines(), START.strip(),
     "load_tensors: CUDA0 model buffer size = 999999999999999999999 MiB",
     "load_tensors: CUDA0 model buffer size = 1e308 MiB",
     "load_tensors: CUDA0 model buffer size = ٣.٣ MiB",
     "load_tensors: offloaded 99999999/1 layers to GPU", "|   - RPC0 | 1 = 1 + 1 + 1"]
)  # fmt: skip


@given(st.lists(_PIECES | st.text(max_size=60), max_size=40).map("\n".join))
def test_whatever_a_log_holds_gives_bounded_figures_or_none(text: str) -> None:
    for found in (parse_load(text), parse_dry_run(text)):
        if found is not None:
            assert all(0 < one.total_bytes < 2**70 for one in found.parts)
            assert len({one.device for one in found.parts}) == len(found.parts)
    assert is_on_host(text).isprintable()


@pytest.mark.parametrize("figure", ["9" * 10, "1e9", "-1", "nan", "inf", "٣", "1.2.3"])
def test_a_figure_that_is_none_is_no_figure(figure: str) -> None:
    text = ADAPTER.replace("0.11 MiB", f"{figure} MiB")
    found = parse_load(text)
    assert found is None or found.on("CUDA0") == mib(2) + mib(0.12) + mib(0.30) + mib(1.02)


def test_what_a_header_says_of_a_model_is_not_taken_for_the_engines_word() -> None:
    """Names are printed behind the name of a function; a line separator is no line feed."""
    told = "fitting params to device memory\u2028load_tensors: CUDA0 model buffer size = 7 MiB"
    text = f"llama_model_loader: - kv 2: general.name str = {told}\nprint_info: general.name = {told}\n"
    assert parse_load(text + ADAPTER) == parse_load(ADAPTER)


def test_what_a_template_prints_comes_too_late() -> None:
    """The server shows an example of it, line feeds and all, when it has all its memory."""
    shown = "srv          init: init: chat template, example_format: '\n"
    forged = "load_tensors: CUDA0 model buffer size = 7.00 MiB\n"
    assert parse_load(ADAPTER + shown + forged) == parse_load(ADAPTER)


@pytest.mark.parametrize(
    "text",
    [
        "load_tensors: " + "A" * 10_000_000,
        "load_tensors:" + " " * 10_000_000 + "x",
        "load_tensors: CUDA0 " * 500_000,
        ("load_tensors: CUDA0 model buffer size = 1.00 MiB\n" * 200_000),
        ("synapse-run: start: pid=\n" * 400_000),
        "\x1b[" * 5_000_000,
        "|   - RPC0 | 1 = 1 + ( 1 = 1 + 1 " * 300_000,
        "a: CPU compute buffer size = 1.00 MiB\n" * 200_000,
    ],
    ids=range(8),
)
def test_no_text_takes_long(text: str) -> None:
    """Ten megabytes of anything: some tenths of a second, whatever stands in it."""
    began = time.process_time()
    parse_load(text)
    parse_dry_run(text)
    is_on_host(text)
    assert time.process_time() - began < 10
