"""Checks and executes the programs of a Core ML package.

Static checks first: the model's description against its functions, every name assigned once and before it is used,
every operation's parameters, every declared type against the one its operands give, every blob against its record, and
the discipline of the state: read once at the top, then only what was written last.

Then execution, with state over several calls, in two ways: "exact" computes everything in float64; "fp16" computes each
operation in float64 and rounds its result to half precision, which is what a backend that computes in fp16 and
accumulates in more does at best.
"""

import numpy as np

from mlpackage import Blobs, Broken, Package, check_name, require

BOOL, STRING, FP16, FP32, INT32 = 1, 2, 10, 11, 23
FEATURE_TYPES = {65552: FP16, 131104: INT32}


class Type:
    def __init__(self, dtype, dims):
        self.dtype, self.dims = dtype, tuple(dims)

    def __eq__(self, other):
        return isinstance(other, Type) and (self.dtype, self.dims) == (other.dtype, other.dims)

    def __repr__(self):
        names = {BOOL: "bool", STRING: "string", FP16: "fp16", FP32: "fp32", INT32: "int32"}
        return f"{names.get(self.dtype, self.dtype)}{list(self.dims)}"


def tensor_type(value_type):
    require(set(value_type) == {"tensorType"}, f"a type that is not a tensor: {value_type}")
    tensor = value_type["tensorType"]
    dims = [d["constant"]["size"] for d in tensor["dimensions"]]
    require(tensor.get("rank", 0) == len(dims), f"rank {tensor.get('rank', 0)} with {len(dims)} dimensions")
    require(all(d > 0 for d in dims), f"dimensions {dims}")
    return Type(tensor["dataType"], dims)


def array_type(feature):
    require(feature["dataType"] in FEATURE_TYPES, f"feature of type {feature['dataType']}")
    return Type(FEATURE_TYPES[feature["dataType"]], feature["shape"])


# ---------------------------------------------------------------------------------------------------------------------
# Operations: per type its parameters (required, optional), its type rule and its meaning.
# A type rule gets the operands' types and constant values (None where not constant).


def same(t, c):
    return t["x"]


def broadcast(t, c):
    x, y = t["x"], t["y"]
    require(x.dtype == y.dtype, f"operands {x} and {y}")
    try:
        return Type(x.dtype, np.broadcast_shapes(x.dims, y.dims))
    except ValueError:
        raise Broken(f"{x} and {y} do not broadcast") from None


def conv_type(t, c):
    x, w = t["x"], t["weight"]
    require(len(x.dims) == 4 and len(w.dims) == 4 and w.dims[2:] == (1, 1), f"conv of {x} with {w}")
    require(x.dims[1] == w.dims[1] and x.dtype == w.dtype == FP16, f"conv of {x} with {w}")
    if "bias" in t:
        require(t["bias"] == Type(FP16, w.dims[:1]), f"conv bias {t['bias']}")
    expected = {"strides": [1, 1], "pad": [0] * 4, "dilations": [1, 1], "groups": 1, "pad_type": "valid"}
    for name, value in expected.items():
        require(c[name] is not None and np.array_equal(c[name], value), f"conv {name} is {c[name]}")
    return Type(x.dtype, (x.dims[0], w.dims[0], *x.dims[2:]))


def matmul_type(t, c):
    x, y = t["x"], t["y"]
    require(x.dtype == y.dtype == FP16 and len(x.dims) == len(y.dims) >= 2, f"matmul of {x} and {y}")
    require(x.dims[:-2] == y.dims[:-2] and not c["transpose_x"], f"matmul of {x} and {y}")
    inner, columns = y.dims[:-3:-1] if c["transpose_y"] else y.dims[-2:]
    require(x.dims[-1] == inner, f"matmul of {x} and {y}")
    return Type(x.dtype, (*x.dims[:-1], columns))


def layer_norm_type(t, c):
    require(list(c["axes"]) == [-1] and t["epsilon"].dtype in (FP16, FP32) and t["epsilon"].dims == (), "layer_norm")
    require(c["epsilon"] > 0, "layer_norm: epsilon is not positive")
    return t["x"]


def softmax_type(t, c):
    require(c["axis"] == -1, f"softmax over axis {c['axis']}")
    return t["x"]


def concat_type(t, c):
    values, axis = t["values"], int(c["axis"])
    axis += len(values[0].dims) if axis < 0 else 0
    require(not c["interleave"] and len({v.dtype for v in values}) == 1, "concat")
    rest = {v.dims[:axis] + v.dims[axis + 1 :] for v in values}
    require(len(rest) == 1, f"concat of {values}")
    dims = list(values[0].dims)
    dims[axis] = sum(v.dims[axis] for v in values)
    return Type(values[0].dtype, dims)


def slice_type(t, c):
    x, begin, end = t["x"], c["begin"], c["end"]
    require(len(begin) == len(end) == len(x.dims), f"slice of {x}")
    require(all(0 <= b < e <= d for b, e, d in zip(begin, end, x.dims)), f"slice {begin}..{end} of {x}")
    return Type(x.dtype, [e - b for b, e in zip(begin, end)])


def slice_update_type(t, c):
    x, update = t["x"], t["update"]
    rank = len(x.dims)
    for name in ("begin", "end"):
        require(t[name] == Type(INT32, (rank,)), f"slice_update {name} is {t[name]}")
        require(len(c[f"{name}_mask"]) == rank, f"slice_update {name}_mask")
    require(x.dtype == update.dtype and len(update.dims) == rank, f"slice_update of {x} with {update}")
    return x


def reshape_type(t, c):
    require(np.prod(c["shape"]) == np.prod(t["x"].dims), f"reshape of {t['x']} to {c['shape']}")
    return Type(t["x"].dtype, c["shape"])


def transpose_type(t, c):
    perm = list(c["perm"])
    require(sorted(perm) == list(range(len(t["x"].dims))), f"transpose of {t['x']} by {perm}")
    return Type(t["x"].dtype, [t["x"].dims[p] for p in perm])


def expand_type(t, c):
    return Type(t["x"].dtype, np.expand_dims(np.empty(t["x"].dims, dtype=bool), tuple(c["axes"])).shape)


def squeeze_type(t, c):
    require(all(t["x"].dims[a] == 1 for a in c["axes"]), f"squeeze of {t['x']}")
    return Type(t["x"].dtype, [d for i, d in enumerate(t["x"].dims) if i not in list(c["axes"])])


def conv(x, weight, bias=None, **_):
    y = np.matmul(weight[:, :, 0, 0], x[0, :, 0, :])[None, :, None, :]
    return y if bias is None else y + bias[None, :, None, None]


def layer_norm(x, axes, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float64(epsilon))


def softmax(x, axis):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-np.clip(x, -700, None)))


def slice_update(x, update, begin, end, begin_mask, end_mask):
    ranges = []
    for b, e, bm, em, size in zip(begin, end, begin_mask, end_mask, x.shape):
        b, e = (0 if bm else int(b)), (size if em else int(e))
        require(0 <= b < e <= size, f"slice_update of {b}..{e} on an axis of {size}")
        ranges.append(slice(b, e))
    require(x[tuple(ranges)].shape == update.shape, f"slice_update: {update.shape} into {ranges}")
    result = x.copy()
    result[tuple(ranges)] = update
    return result


def cut(x, begin, end):
    return x[tuple(slice(b, e) for b, e in zip(begin, end))]


CONV = "x weight strides pad_type pad dilations groups".split()
UPDATE = "x update begin end begin_mask end_mask".split()
OPERATIONS = {
    "add": (["x", "y"], [], broadcast, lambda x, y: x + y),
    "mul": (["x", "y"], [], broadcast, lambda x, y: x * y),
    "silu": (["x"], [], same, silu),
    "conv": (CONV, ["bias"], conv_type, conv),
    "matmul": (
        ["x", "y", "transpose_x", "transpose_y"],
        [],
        matmul_type,
        lambda x, y, transpose_x, transpose_y: np.matmul(x, y.swapaxes(-1, -2) if transpose_y else y),
    ),
    "layer_norm": (["x", "axes", "epsilon"], [], layer_norm_type, layer_norm),
    "softmax": (["x", "axis"], [], softmax_type, softmax),
    "concat": (
        ["values", "axis", "interleave"],
        [],
        concat_type,
        lambda values, axis, interleave: np.concatenate(values, int(axis)),
    ),
    "slice_by_index": (["x", "begin", "end"], [], slice_type, cut),
    "slice_update": (UPDATE, [], slice_update_type, slice_update),
    "reshape": (["x", "shape"], [], reshape_type, lambda x, shape: x.reshape(shape)),
    "transpose": (["x", "perm"], [], transpose_type, lambda x, perm: x.transpose(perm)),
    "expand_dims": (["x", "axes"], [], expand_type, lambda x, axes: np.expand_dims(x, tuple(axes))),
    "squeeze": (["x", "axes"], [], squeeze_type, lambda x, axes: np.squeeze(x, tuple(axes))),
}
# Parameters that must be constants.
CONSTANT = set(
    "strides pad_type pad dilations groups weight bias transpose_x transpose_y axes epsilon axis interleave begin_mask "
    "end_mask shape perm".split()
)


class Function:
    """One function: checked when made, then callable."""

    def __init__(self, name, function, blobs):
        self.name, self.blobs = name, blobs
        self.types, self.constants, self.states, self.used = {}, {}, {}, set()
        require(function["opset"] == "CoreML8", f"{name}: opset {function['opset']}")
        require(set(function["block_specializations"]) == {"CoreML8"}, f"{name}: block specializations")
        block = function["block_specializations"]["CoreML8"]
        self.inputs = {}
        for parameter in function["inputs"]:
            self.declare(parameter["name"])
            if "stateType" in parameter["type"]:
                self.states[parameter["name"]] = tensor_type(parameter["type"]["stateType"]["wrappedType"])
                self.types[parameter["name"]] = None
            else:
                self.inputs[parameter["name"]] = self.types[parameter["name"]] = tensor_type(parameter["type"])
        self.operations = block["operations"]
        self.names = set()
        self.last_read = dict.fromkeys(self.states)  # name of the value read last, per state
        self.written = dict.fromkeys(self.states)  # operation index of a write that no read has followed
        for index, operation in enumerate(self.operations):
            try:
                self.check(index, operation)
            except Broken as broken:
                label = operation["outputs"][0]["name"] if operation["outputs"] else operation["type"]
                raise Broken(f"{name}: {operation['type']} {label}: {broken}") from None
        for state, written in self.written.items():
            require(written is None, f"{name}: the last write of {state} is never read back")
            require(self.last_read[state] is not None, f"{name}: {state} is never read")
        self.outputs = block["outputs"]
        require(len(self.outputs) > 0, f"{name}: no outputs")
        for output in self.outputs:
            require(output in self.types, f"{name}: output {output} is no value")

    def declare(self, name):
        check_name(name)
        require(name not in self.types, f"{name} is assigned twice")

    def check(self, index, operation):
        kind = operation["type"]
        label = self.immediate(operation["attributes"].get("name"))
        require(label is not None and label.shape == (), f"the name attribute is {label}")
        require(label.item() not in self.names, f"a second operation is named {label}")
        self.names.add(label.item())
        require(set(operation["attributes"]) == ({"name", "val"} if kind == "const" else {"name"}), "attributes")
        operands = {}
        for parameter, argument in operation["inputs"].items():
            names = [binding["name"] for binding in argument["arguments"]]
            for name in names:
                require(name in self.types, f"{parameter} is {name}, which has no value yet")
            require(parameter == "values" or len(names) == 1, f"{parameter} has {len(names)} arguments")
            operands[parameter] = names if parameter == "values" else names[0]
        if kind == "write_state":
            require(not operation["outputs"] and set(operands) == {"input", "data"}, "parameters")
            state = operands["input"]
            require(state in self.states, f"{state} is no state")
            require(self.types[operands["data"]] == self.states[state], f"data is {self.types[operands['data']]}")
            require(self.written[state] is None, "the write before was not read back")
            require(self.last_read[state] is not None, "written before it was read")
            self.written[state] = index
            return
        require(len(operation["outputs"]) == 1, f"{len(operation['outputs'])} outputs")
        output = operation["outputs"][0]
        declared = tensor_type(output["type"])
        self.declare(output["name"])
        if kind == "const":
            require(not operands, "a constant with operands")
            self.constants[output["name"]] = self.constant(operation["attributes"]["val"], declared)
            found = declared
        elif kind == "read_state":
            require(set(operands) == {"input"} and operands["input"] in self.states, "parameters")
            state = operands["input"]
            # a second read without a write between is merged with the first by an optimiser, which then loses updates
            first = self.last_read[state] is None
            require(first or self.written[state] == index - 1, "a second read of the state without a write before it")
            self.last_read[state], self.written[state] = output["name"], None
            found = self.states[state]
        else:
            require(kind in OPERATIONS, "an operation that nothing here should write")
            needed, optional, rule, _ = OPERATIONS[kind]
            missing = set(needed) - set(operands)
            require(not missing and set(operands) <= set(needed + optional), f"parameters {sorted(operands)}")
            types, constants = {}, {}
            for parameter, name in operands.items():
                if parameter == "values":
                    types[parameter], constants[parameter] = [self.types[n] for n in name], None
                    require(None not in types[parameter], "a state as an operand")
                    continue
                types[parameter], constants[parameter] = self.types[name], self.constants.get(name)
                require(types[parameter] is not None, f"{parameter} is a state")
                constant = parameter in CONSTANT or (kind == "slice_by_index" and parameter in ("begin", "end"))
                require(not constant or name in self.constants, f"{parameter} is not constant")
            if kind == "slice_update":
                # what is updated must be what the state holds
                require(operands["x"] in self.last_read.values(), f"it updates {operands['x']}, not what was read last")
            found = rule(types, constants)
        require(found == declared, f"declared as {declared}, but its operands make it {found}")
        self.types[output["name"]] = declared

    def immediate(self, value, declared=None):
        if value is None or "immediateValue" not in value:
            return None
        tensor = value["immediateValue"]["tensor"]
        require(len(tensor) == 1, f"a constant of several kinds: {list(tensor)}")
        kind, body = next(iter(tensor.items()))
        found = tensor_type(value["type"])
        require(declared is None or found == declared, f"its value is {found}")
        expected = {"floats": FP32, "ints": INT32, "bools": BOOL, "strings": STRING, "bytes": FP16}[kind]
        require(found.dtype == expected, f"{kind} as {found}")
        if kind == "bytes":
            values = np.frombuffer(body["values"], dtype="<f2").astype(np.float64)
        else:
            values = np.array(body["values"], dtype={"floats": np.float32, "ints": np.int64, "bools": bool}.get(kind))
        require(values.size == np.prod(found.dims, dtype=int), f"{values.size} values for {found}")
        return values.reshape(found.dims)

    def constant(self, value, declared):
        if "blobFileValue" not in value:
            return self.immediate(value, declared)
        require(tensor_type(value["type"]) == declared and declared.dtype == FP16, f"blob of {declared}")
        blob = value["blobFileValue"]
        require(blob["fileName"] == "@model_path/weights/weight.bin", f"file {blob['fileName']}")
        require(blob["offset"] in self.blobs.at, f"no blob has its record at {blob['offset']}")
        data = self.blobs.at[blob["offset"]]
        require(data.size == np.prod(declared.dims), f"the blob has {data.size} values")
        self.used.add(blob["offset"])
        return data.reshape(declared.dims)

    def __call__(self, inputs, states, mode, widened):
        """Runs it: arrays by name in and out; `states` (arrays by name) is changed. `widened` caches constants."""
        require(set(inputs) == set(self.inputs), f"inputs {sorted(inputs)}")
        values = {}
        for name, value in inputs.items():
            require(value.shape == self.inputs[name].dims, f"input {name} has shape {value.shape}")
            values[name] = value.astype(np.int64 if self.inputs[name].dtype == INT32 else np.float64)
        for operation in self.operations:
            kind = operation["type"]
            operand = lambda parameter: [values[b["name"]] for b in operation["inputs"][parameter]["arguments"]]
            if kind == "write_state":
                states[operation["inputs"]["input"]["arguments"][0]["name"]] = operand("data")[0]
                continue
            output = operation["outputs"][0]["name"]
            if kind == "const":
                value = self.constants[output]
                if value is not None and value.dtype == np.float16:
                    key = value.__array_interface__["data"][0]
                    if key not in widened:
                        widened[key] = value.astype(np.float64)
                    value = widened[key].reshape(value.shape)
                values[output] = value
                continue
            if kind == "read_state":
                values[output] = states[operation["inputs"]["input"]["arguments"][0]["name"]]
                continue
            arguments = {p: operand(p) if p == "values" else operand(p)[0] for p in operation["inputs"]}
            result = OPERATIONS[kind][3](**arguments)
            if mode == "fp16" and self.types[output].dtype == FP16:
                with np.errstate(over="ignore"):
                    result = result.astype(np.float16).astype(np.float64)
            values[output] = result
        return {name: values[name] for name in self.outputs}


class Program:
    """A package's functions, checked; execution keeps the state outside."""

    def __init__(self, path):
        self.package = Package(path)
        model = self.package.model
        require(model["specificationVersion"] == 9, f"specification version {model['specificationVersion']}")
        description = model["description"]
        for name in ("input", "output", "state"):
            require(not description[name], f"top-level {name} beside functions")
        functions = model["mlProgram"]["functions"]
        require(model["mlProgram"]["version"] == 1, "program version")
        described = {f["name"]: f for f in description["functions"]}
        require(set(described) == set(functions), f"functions {sorted(functions)} are described as {sorted(described)}")
        require(description.get("defaultFunctionName") in functions, "the default function is none of them")
        self.functions = {n: Function(n, f, self.package.blobs) for n, f in functions.items()}
        for name, function in self.functions.items():
            self.check_description(name, function, described[name])
        used = [f.used for f in self.functions.values()]
        require(all(u == set(self.package.blobs.at) for u in used), "a blob that a function does not use")
        states = [f.states for f in self.functions.values()]
        require(all(s == states[0] for s in states), "the functions' states differ")
        self.states = states[0]
        self.widened = {}

    @staticmethod
    def check_description(name, function, described):
        inputs = {f["name"]: array_type(f["type"]["multiArrayType"]) for f in described["input"]}
        outputs = {f["name"]: array_type(f["type"]["multiArrayType"]) for f in described["output"]}
        states = {f["name"]: array_type(f["type"]["stateType"]["arrayType"]) for f in described["state"]}
        require(inputs == function.inputs, f"{name}: inputs {function.inputs} are described as {inputs}")
        require(outputs == {n: function.types[n] for n in function.outputs}, f"{name}: outputs are described as {outputs}")
        require(states == function.states, f"{name}: states are described as {states}")
        require(all(t.dtype == FP16 for t in states.values()), f"{name}: a state that is not fp16")

    def new_state(self):
        return {name: np.zeros(t.dims) for name, t in self.states.items()}

    def run(self, function, inputs, state, mode):
        return self.functions[function](inputs, state, mode, self.widened)


__all__ = ["Blobs", "Broken", "Program"]
