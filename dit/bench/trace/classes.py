"""What an operation or a kernel is for, by its name: tables of patterns, the first that fits counts."""

from __future__ import annotations

import functools
import re

GEMM, ATTENTION, ELEMENTWISE = "matrix products", "attention", "elementwise"
OPTIMIZER, AVERAGE, COMMUNICATION = "optimizer", "average (EMA)", "communication"
DRAWS, COPIES, METRICS = "random draws", "data and copies", "metrics"
IDLE, HOST, OTHER = "idle", "host (Python, dispatch)", "not classified"
# Parts of a step, in the order of the table. On a GPU the host's work counts where it leaves the device idle.
PARTS = (
    GEMM, ATTENTION, ELEMENTWISE, OPTIMIZER, AVERAGE, COMMUNICATION, DRAWS, COPIES, METRICS, HOST, IDLE, OTHER
)  # fmt: skip
# Regions that the trace marks; what runs inside is theirs, but for communication.
REGIONS = (OPTIMIZER, AVERAGE, DRAWS, METRICS)
STEP = "training step"  # the mark around each step

SENDING = r"nccl|gloo|c10d|all_?reduce|reduce_?scatter|all_?gather|broadcast_|_coalesced_"
# Kernels of CUDA, as cuBLAS, cuDNN, CUTLASS, FlashAttention, torch, Inductor and Triton name them.
KERNELS = (
    (COMMUNICATION, SENDING),
    (ATTENTION, r"flash|fmha|attention|attn|sdpa|_softmax"),
    (GEMM, r"gemm|nvjet|cublas|cutlass|xmma|wgmma|splitk|gemv|convolution|conv2d|cudnn|dot_kernel"),
    (OPTIMIZER, r"adam|multi_tensor_apply"),
    (COPIES, r"memcpy|memset|catarray|copy|fill"),
    (
        ELEMENTWISE,
        r"elementwise|layer_?norm|gelu|silu|reduce|triton|gammabeta|index|gather|scatter|embedding|norm|cos|sin",
    ),
    (ELEMENTWISE, r"_kernel|kernel_"),
)
# Operations of a CPU. What calls others is the host's: its own time is dispatch.
OPERATIONS = (
    (COMMUNICATION, SENDING),
    (ATTENTION, r"scaled_dot_product|flash_attention|_softmax"),
    (GEMM, r"aten::(addmm|mm|bmm|baddbmm|matmul|dot|mv|addmv|linear|mkldnn\w*|convolution\w*|_convolution\w*|conv2d)$"
           r"|thnn_conv|mkl|gemm|convolution_backward"),
    (OPTIMIZER, r"adam|_foreach_"),
    (COPIES, r"aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|zeros\w*|ones\w*|full\w*|"
             r"empty\w*|new_\w+|resize_|pin_memory|lift_fresh|detach_?|(un)?flatten_dense_tensors|narrow|chunk|"
             r"split|split_with_sizes|set_|alias|_reshape_alias|repeat|scalar_tensor)$"),
    (ELEMENTWISE, r"CompiledFxGraph"),  # its own time: the loops that the compiler fused, which are no operations
    (HOST, r"^(autograd::|torch::autograd|Optimizer\.|ProfilerStep|torch/|PyTorch|TorchDynamo|CompiledFunction)"
           r"|Backward\d+>?$|Guard|^<|\.py|DeepSpeed|deepspeed|^aten::(t|transpose|permute|view|_unsafe_view|reshape|expand"
           r"|expand_as|as_strided|unsqueeze|squeeze|select|slice|unbind|resolve_conj|resolve_neg|numel|item"
           r"|_local_scalar_dense|is_nonzero|result_type|can_cast|unflatten|flatten|movedim|numpy_T|swapaxes|size|stride"
           r"|view_as|lift)$"),
    (ELEMENTWISE, r"aten::(native_)?(layer_norm|group_norm|rms_norm|gelu|silu|relu|sigmoid|tanh|softplus)\w*$"
                  r"|triton_|graph_\d|cpp_fused|extern_kernels"),
    (ELEMENTWISE, r"aten::_?(add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|exp|log|sin|cos|erf|erfinv|abs|sum|mean"
                  r"|amax|amin|max|min|where|clamp\w*|lerp|addcmul|addcdiv|norm|vector_norm|linalg_\w+|eq|ne|lt|le|gt|ge|all"
                  r"|any|isfinite|isnan|isinf|logical_\w+|bitwise_\w+|__\w+__|floor\w*|remainder|fmod|round|trunc|reciprocal"
                  r"|sign|index\w*|gather\w*|scatter\w*|embedding\w*|masked_\w+|arange|linspace|rand\w*|normal_|uniform_"
                  r"|cumsum|sort|argmax|unfold\w*|im2col|mse_loss\w*|einsum|outer|_foreach\w*|special_\w+|expm1|log1p|var"
                  r"|std|count_nonzero|var_mean|bincount|nan_to_num|maximum|minimum|one_hot|flip|roll|prod|stft)_?$"),
)  # fmt: skip


@functools.cache
def classify(name: str, is_kernel: bool) -> str:
    """Name the part of a step that a kernel of a GPU, or an operation of a CPU, belongs to; OTHER for none."""
    for part, pattern in KERNELS if is_kernel else OPERATIONS:
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return OTHER
