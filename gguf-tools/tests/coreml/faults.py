"""Ways to break a package. Each takes a Model message (coremltools' own classes) and the path of its weight file, and
breaks both functions alike unless that is the point.
"""

import numpy as np


def blocks(model):
    for function in model.mlProgram.functions.values():
        yield function.block_specializations["CoreML8"]


def find(block, name):
    """The operation whose output or name ends with `name`, the first one."""
    for operation in block.operations:
        label = operation.attributes["name"].immediateValue.tensor.strings.values[0]
        if label.endswith(name):
            return operation
    raise KeyError(name)


def argument(operation, parameter, index=0):
    return operation.inputs[parameter].arguments[index]


def set_half(operation, value):
    operation.attributes["val"].immediateValue.tensor.bytes.values = np.float16(value).tobytes()


def offset(operation):
    return operation.attributes["val"].blobFileValue


def each(change):
    def fault(model, weights):
        for block in blocks(model):
            change(block)

    fault.__name__ = change.__name__
    return fault


def swap_offsets(block, a, b):
    a, b = offset(find(block, a)), offset(find(block, b))
    a.offset, b.offset = b.offset, a.offset


def insert(block, before, source, **changes):
    """A copy of operation `source` before operation `before`, with another name and other arguments."""
    operations = list(block.operations)
    copy = type(operations[0])()
    copy.CopyFrom(source)
    name = changes.pop("name")
    copy.attributes["name"].immediateValue.tensor.strings.values[0] = name
    copy.outputs[0].name = name
    for parameter, value in changes.items():
        argument(copy, parameter).name = value
    index = next(i for i, o in enumerate(operations) if o is before or o == before)
    del block.operations[:]
    block.operations.extend(operations[:index] + [copy] + operations[index:])


@each
def gate_and_up_swapped(block):
    swap_offsets(block, "gate0_weight", "up0_weight")


@each
def k_and_v_swapped(block):
    swap_offsets(block, "k_weight", "v_weight")


@each
def gains_swapped(block):
    swap_offsets(block, "attn_norm_gain", "ffn_norm_gain")


@each
def k_written_one_position_late(block):
    one = find(block, "n_rows")
    insert(block, find(block, "pos_end"), one, name="one")
    find(block, "one").attributes["val"].immediateValue.tensor.ints.values[0] = 1
    before = find(block, "k_store_begin")
    add = find(block, "pos_end")
    insert(block, before, add, name="late_begin", y="one")
    insert(block, before, add, name="late_end", x="pos_end", y="one")
    argument(find(block, "k_store_begin"), "values", 2).name = "late_begin"
    argument(find(block, "k_store_end"), "values", 2).name = "late_end"


@each
def k_and_v_rows_of_the_state_swapped(block):
    for name in ("row", "row_end"):
        k = find(block, f"k_store_{name}").attributes["val"].immediateValue.tensor.ints
        v = find(block, f"v_store_{name}").attributes["val"].immediateValue.tensor.ints
        k.values[0], v.values[0] = v.values[0], k.values[0]


@each
def rope_sign_lost(block):
    set_half(find(block, "q_second_negated_y"), 1)


@each
def rope_halves_swapped(block):
    turned = find(block, "k_turned")
    a, b = argument(turned, "values", 0), argument(turned, "values", 1)
    a.name, b.name = b.name, a.name


@each
def sine_used_for_cosine(block):
    argument(find(block, "k_cos"), "y").name = "sin"


@each
def second_read_of_the_state(block):
    update = find(block, "v_store_updated")
    insert(block, update, find(block, "kv_before"), name="kv_again")
    argument(find(block, "v_store_updated"), "x").name = "kv_again"


@each
def v_updates_the_old_cache(block):
    argument(find(block, "v_store_updated"), "x").name = "kv_before"


@each
def keys_read_before_they_are_written(block):
    argument(find(block, "keys"), "x").name = "kv_before"


def write_left_out(model, weights):
    for block in blocks(model):
        operations = [o for o in block.operations if o.type != "write_state"]
        del block.operations[:]
        block.operations.extend(operations)


@each
def epsilon_unscaled(block):
    floats = find(block, "attn_norm_normed_epsilon").attributes["val"].immediateValue.tensor.floats
    floats.values[0] *= 4096


@each
def norm_scale_wrong(block):
    set_half(find(block, "ffn_norm_small_y"), 1 / 4096)


@each
def q_not_scaled(block):
    set_half(find(block, "q_scaled_y"), 1)


@each
def mask_left_out(block):
    argument(find(block, "probabilities"), "x").name = argument(find(block, "scores_masked"), "x").name


@each
def bias_left_out(block):
    conv = next(o for o in block.operations if o.type == "conv" and "bias" in o.inputs)
    del conv.inputs["bias"]


@each
def residual_left_out(block):
    add = find(block, "attn_sum")
    argument(add, "x").name = argument(add, "y").name


@each
def silu_left_out(block):
    mul = find(block, "inner0")
    argument(mul, "x").name = argument(find(block, "gate0_silu"), "x").name


@each
def blob_offset_is_the_data(block):
    offset(find(block, "q_weight")).offset += 64


@each
def blob_offset_is_off(block):
    offset(find(block, "o_weight")).offset += 8


@each
def transpose_forgotten(block):
    matmul = find(block, "scores_grouped")
    constant = find(block, argument(matmul, "transpose_y").name)
    constant.attributes["val"].immediateValue.tensor.bools.values[0] = False


@each
def declared_type_wrong(block):
    find(block, "attn_sum").outputs[0].type.tensorType.dimensions[2].constant.size += 1


@each
def name_assigned_twice(block):
    find(block, "ffn_rows").outputs[0].name = find(block, "attn_rows").outputs[0].name


@each
def used_before_it_is_made(block):
    operations = list(block.operations)
    index = next(i for i, o in enumerate(operations) if o.outputs and o.outputs[0].name.endswith("attn_sum"))
    operations.insert(index - 1, operations.pop(index))
    del block.operations[:]
    block.operations.extend(operations)


@each
def name_core_ml_refuses(block):
    operation = find(block, "attn_rows")
    name = operation.outputs[0].name
    operation.outputs[0].name = "1-" + name
    for other in block.operations:
        for parameter in other.inputs.values():
            for binding in parameter.arguments:
                binding.name = "1-" + name if binding.name == name else binding.name


@each
def softmax_over_the_rows(block):
    constant = find(block, argument(find(block, "probabilities"), "axis").name)
    constant.attributes["val"].immediateValue.tensor.ints.values[0] = -2


def functions_with_different_weights(model, weights):
    swap_offsets(next(iter(blocks(model))), "gate0_weight", "up0_weight")


def description_of_another_shape(model, weights):
    for function in model.description.functions:
        function.state[0].type.stateType.arrayType.shape[2] += 32


def specification_of_another_version(model, weights):
    model.specificationVersion = 8


def head_order_left_as_in_gguf(model, weights):
    """llama only: q's rows neighbour by neighbour."""
    block = next(iter(blocks(model)))
    operation = find(block, "q_weight")
    rows, columns = [d.constant.size for d in operation.outputs[0].type.tensorType.dimensions[:2]]
    head_dim = find(block, "q_heads").outputs[0].type.tensorType.dimensions[3].constant.size
    at = offset(operation).offset + 64
    data = bytearray(weights.read_bytes())
    matrix = np.frombuffer(data, np.float16, rows * columns, at).reshape(-1, 2, head_dim // 2, columns)
    data[at : at + 2 * rows * columns] = matrix.swapaxes(1, 2).tobytes()
    weights.write_bytes(data)


def one_weight_bit_flipped(model, weights):
    block = next(iter(blocks(model)))
    data = bytearray(weights.read_bytes())
    data[offset(find(block, "o_weight")).offset + 64 + 1] ^= 0x40
    weights.write_bytes(data)


def weight_file_cut_short(model, weights):
    weights.write_bytes(weights.read_bytes()[:-64])


def record_without_magic(model, weights):
    data = bytearray(weights.read_bytes())
    data[offset(find(next(iter(blocks(model))), "v_weight")).offset] ^= 1
    weights.write_bytes(data)


ALL = [f for name, f in list(globals().items()) if callable(f) and not name.startswith("_")]
HELPERS = {"blocks", "find", "argument", "set_half", "offset", "each", "swap_offsets", "insert"}
ALL = [f for f in ALL if f.__name__ not in HELPERS]
