//! Builds one function of an ML program, operation by operation, with its types.
//!
//! Every method appends one operation (and the constants it takes) and returns the value it makes, with the type
//! inferred here; Core ML checks the declared types when it compiles, and the test tree checks them twice (its own
//! evaluator, and coremltools' type inference). Parameters that have defaults are written out, as coremltools does.
//!
//! A constant is an operation of its own. Those a program needs for its shape (axes, permutations) are immediate;
//! tensors of the model lie in the weight file and are named by the offset of their record there.
//!
//! Values are single-assignment and their names are made here from literals and block numbers: nothing of a model
//! file's text gets into a program. The methods take only shapes that the caller has already validated, so a wrong
//! one is a bug of this crate and panics.

use std::collections::BTreeMap;

use half::f16;

use super::proto;
use super::proto::{DataType, tensor_value, value, value_type};

/// Name of the operation set of iOS 18.
pub const OPSET: &str = "CoreML8";

/// How a program names its weight file.
pub const WEIGHT_FILE: &str = "@model_path/weights/weight.bin";

/// A value of a function: its name and type.
#[derive(Clone, Debug)]
pub struct Val {
    name: String,
    data_type: DataType,
    dims: Vec<u64>, // outermost first; none: a scalar
}

impl Val {
    /// Outermost first.
    pub fn dims(&self) -> &[u64] {
        &self.dims
    }
}

/// A state of a function: an array that outlives the call.
#[derive(Clone, Debug)]
pub struct State {
    name: String,
    dims: Vec<u64>,
}

/// One function under construction.
#[derive(Default)]
pub struct FunctionBuilder {
    parameters: Vec<proto::NamedValueType>,
    input_features: Vec<proto::FeatureDescription>,
    state_features: Vec<proto::FeatureDescription>,
    operations: Vec<proto::Operation>,
}

impl FunctionBuilder {
    /// An input of the function: fp16 or int32.
    pub fn input(&mut self, name: &str, data_type: DataType, dims: &[u64], about: &str) -> Val {
        self.parameters.push(named(name, tensor_type(data_type, dims)));
        self.input_features.push(feature(name, about, array_feature(data_type, dims)));
        Val { name: name.into(), data_type, dims: dims.into() }
    }

    /// A state of the function; always fp16.
    pub fn state(&mut self, name: &str, dims: &[u64], about: &str) -> State {
        let wrapped = tensor_type(DataType::Float16, dims);
        let state = proto::StateType { wrapped_type: Some(Box::new(wrapped)) };
        let r#type = proto::ValueType { r#type: Some(value_type::Type::State(Box::new(state))) };
        self.parameters.push(named(name, r#type));
        let proto::feature_type::Type::MultiArray(array) = array_feature(DataType::Float16, dims) else {
            unreachable!("array_feature makes arrays");
        };
        let state = proto::StateFeatureType { array_type: Some(array) };
        self.state_features.push(feature(name, about, proto::feature_type::Type::State(state)));
        State { name: name.into(), dims: dims.into() }
    }

    /// A tensor of the weight file, fp16; `record` is the offset of its metadata record there.
    pub fn weight(&mut self, name: &str, dims: &[u64], record: u64) -> Val {
        let blob = proto::BlobFileValue { file_name: WEIGHT_FILE.into(), offset: record };
        self.constant(name, DataType::Float16, dims, value::Value::BlobFile(blob))
    }

    /// x + y, shapes broadcast.
    pub fn add(&mut self, name: &str, x: &Val, y: &Val) -> Val {
        self.elementwise("add", name, x, y)
    }

    /// x * y, shapes broadcast.
    pub fn mul(&mut self, name: &str, x: &Val, y: &Val) -> Val {
        self.elementwise("mul", name, x, y)
    }

    /// x * y for a constant y.
    pub fn scale(&mut self, name: &str, x: &Val, y: f16) -> Val {
        let y = self.f16(&format!("{name}_y"), y);
        self.mul(name, x, &y)
    }

    /// x / (1 + exp(-x))
    pub fn silu(&mut self, name: &str, x: &Val) -> Val {
        self.operation("silu", name, &[("x", &[x])], x.data_type, x.dims.clone())
    }

    /// Softmax over the last axis.
    pub fn softmax(&mut self, name: &str, x: &Val) -> Val {
        let axis = self.int(&format!("{name}_axis"), -1);
        self.operation("softmax", name, &[("x", &[x]), ("axis", &[&axis])], x.data_type, x.dims.clone())
    }

    /// (x - mean) / sqrt(variance + epsilon) over the last axis, without gain. epsilon is fp32 beside an fp16 x
    /// (allowed since iOS 17): the ones needed here are far below fp16's smallest number.
    pub fn layer_norm(&mut self, name: &str, x: &Val, epsilon: f32) -> Val {
        let axes = self.ints(&format!("{name}_axes"), &[-1]);
        let epsilon = {
            let name = format!("{name}_epsilon");
            let floats = tensor_value::Value::Floats(proto::RepeatedFloats { values: vec![epsilon] });
            self.constant(&name, DataType::Float32, &[], immediate(floats))
        };
        let inputs: [(&str, &[&Val]); 3] = [("x", &[x]), ("axes", &[&axes]), ("epsilon", &[&epsilon])];
        self.operation("layer_norm", name, &inputs, x.data_type, x.dims.clone())
    }

    /// 1x1 convolution: x `[1, in, 1, T]`, weight `[out, in, 1, 1]`, bias `[out]` -> `[1, out, 1, T]`.
    pub fn conv(&mut self, name: &str, x: &Val, weight: &Val, bias: Option<&Val>) -> Val {
        assert!(x.dims.len() == 4 && weight.dims.len() == 4 && weight.dims[2..] == [1, 1], "{name}: shapes");
        assert_eq!(x.dims[1], weight.dims[1], "{name}: channels");
        assert!(bias.is_none_or(|b| b.dims == [weight.dims[0]]), "{name}: bias");
        let pad_type = self.string(&format!("{name}_pad_type"), "valid");
        let strides = self.ints(&format!("{name}_strides"), &[1, 1]);
        let pad = self.ints(&format!("{name}_pad"), &[0, 0, 0, 0]);
        let dilations = self.ints(&format!("{name}_dilations"), &[1, 1]);
        let groups = self.int(&format!("{name}_groups"), 1);
        let bias = bias.map(|b| [b]);
        let mut inputs: Vec<(&str, &[&Val])> =
            vec![("x", std::slice::from_ref(&x)), ("weight", std::slice::from_ref(&weight))];
        let (pad_type, strides, pad, dilations, groups) =
            ([&pad_type], [&strides], [&pad], [&dilations], [&groups]);
        inputs.extend::<[(&str, &[&Val]); 5]>([
            ("pad_type", &pad_type),
            ("strides", &strides),
            ("pad", &pad),
            ("dilations", &dilations),
            ("groups", &groups),
        ]);
        if let Some(bias) = &bias {
            inputs.push(("bias", bias));
        }
        let dims = vec![x.dims[0], weight.dims[0], x.dims[2], x.dims[3]];
        self.operation("conv", name, &inputs, x.data_type, dims)
    }

    /// x @ y, or x @ y^T, over the last two axes; the leading ones must be equal.
    pub fn matmul(&mut self, name: &str, x: &Val, y: &Val, transpose_y: bool) -> Val {
        let rank = x.dims.len();
        assert_eq!(x.dims[..rank - 2], y.dims[..rank - 2], "{name}: leading axes");
        let (inner, columns) = match transpose_y {
            true => (y.dims[rank - 1], y.dims[rank - 2]),
            false => (y.dims[rank - 2], y.dims[rank - 1]),
        };
        assert_eq!(x.dims[rank - 1], inner, "{name}: inner axis");
        let mut dims = x.dims.clone();
        dims[rank - 1] = columns;
        let tx = self.bool(&format!("{name}_transpose_x"), false);
        let ty = self.bool(&format!("{name}_transpose_y"), transpose_y);
        let inputs: [(&str, &[&Val]); 4] =
            [("x", &[x]), ("y", &[y]), ("transpose_x", &[&tx]), ("transpose_y", &[&ty])];
        self.operation("matmul", name, &inputs, x.data_type, dims)
    }

    /// The same elements in another shape.
    pub fn reshape(&mut self, name: &str, x: &Val, dims: &[u64]) -> Val {
        assert_eq!(x.dims.iter().product::<u64>(), dims.iter().product::<u64>(), "{name}: element count");
        let shape = self.ints(&format!("{name}_shape"), &to_i32(dims));
        self.operation("reshape", name, &[("x", &[x]), ("shape", &[&shape])], x.data_type, dims.into())
    }

    /// Axes in another order: axis i of the result is axis `perm[i]` of x.
    pub fn transpose(&mut self, name: &str, x: &Val, perm: &[usize]) -> Val {
        assert_eq!(perm.len(), x.dims.len(), "{name}: rank");
        let dims = perm.iter().map(|&p| x.dims[p]).collect();
        let perm = self.ints(&format!("{name}_perm"), &perm.iter().map(|&p| p as i32).collect::<Vec<_>>());
        self.operation("transpose", name, &[("x", &[x]), ("perm", &[&perm])], x.data_type, dims)
    }

    /// A new axis of size 1 before `axis`.
    pub fn expand_dims(&mut self, name: &str, x: &Val, axis: usize) -> Val {
        let mut dims = x.dims.clone();
        dims.insert(axis, 1);
        let axes = self.ints(&format!("{name}_axes"), &[axis as i32]);
        self.operation("expand_dims", name, &[("x", &[x]), ("axes", &[&axes])], x.data_type, dims)
    }

    /// Drops `axis`, which has size 1.
    pub fn squeeze(&mut self, name: &str, x: &Val, axis: usize) -> Val {
        let mut dims = x.dims.clone();
        assert_eq!(dims.remove(axis), 1, "{name}: axis");
        let axes = self.ints(&format!("{name}_axes"), &[axis as i32]);
        self.operation("squeeze", name, &[("x", &[x]), ("axes", &[&axes])], x.data_type, dims)
    }

    /// The values one after the other along `axis`, counted from the front.
    pub fn concat(&mut self, name: &str, values: &[&Val], axis: usize) -> Val {
        let mut dims = values[0].dims.clone();
        dims[axis] = values.iter().map(|v| v.dims[axis]).sum();
        let axis = self.int(&format!("{name}_axis"), axis as i32);
        let interleave = self.bool(&format!("{name}_interleave"), false);
        let inputs: [(&str, &[&Val]); 3] =
            [("values", values), ("axis", &[&axis]), ("interleave", &[&interleave])];
        self.operation("concat", name, &inputs, values[0].data_type, dims)
    }

    /// `x[begin[0]..end[0], begin[1]..end[1], ...]`
    pub fn slice(&mut self, name: &str, x: &Val, begin: &[u64], end: &[u64]) -> Val {
        assert!(begin.len() == x.dims.len() && end.len() == x.dims.len(), "{name}: rank");
        assert!(end.iter().zip(&x.dims).all(|(e, d)| e <= d), "{name}: end");
        let dims = begin.iter().zip(end).map(|(b, e)| e - b).collect();
        let begin = self.ints(&format!("{name}_begin"), &to_i32(begin));
        let end = self.ints(&format!("{name}_end"), &to_i32(end));
        let inputs: [(&str, &[&Val]); 3] = [("x", &[x]), ("begin", &[&begin]), ("end", &[&end])];
        self.operation("slice_by_index", name, &inputs, x.data_type, dims)
    }

    /// x with `update` in `x[begin..end]`. `begin` and `end` are int32 values known at run time; axes whose `whole`
    /// is set are taken in full whatever they say.
    pub fn slice_update(
        &mut self,
        name: &str,
        x: &Val,
        update: &Val,
        begin: &Val,
        end: &Val,
        whole: &[bool],
    ) -> Val {
        let bools =
            |whole: &[bool]| tensor_value::Value::Bools(proto::RepeatedBools { values: whole.into() });
        let rank = [whole.len() as u64];
        let begin_mask =
            self.constant(&format!("{name}_begin_mask"), DataType::Bool, &rank, immediate(bools(whole)));
        let end_mask =
            self.constant(&format!("{name}_end_mask"), DataType::Bool, &rank, immediate(bools(whole)));
        let inputs: [(&str, &[&Val]); 6] = [
            ("x", &[x]),
            ("update", &[update]),
            ("begin", &[begin]),
            ("end", &[end]),
            ("begin_mask", &[&begin_mask]),
            ("end_mask", &[&end_mask]),
        ];
        self.operation("slice_update", name, &inputs, x.data_type, x.dims.clone())
    }

    /// The state's value now.
    pub fn read_state(&mut self, name: &str, state: &State) -> Val {
        let input = Val { name: state.name.clone(), data_type: DataType::Float16, dims: state.dims.clone() };
        self.operation("read_state", name, &[("input", &[&input])], DataType::Float16, state.dims.clone())
    }

    /// Replaces the state's value. The operation makes none.
    pub fn write_state(&mut self, name: &str, state: &State, data: &Val) {
        assert_eq!(state.dims, data.dims, "{name}: shape of the state");
        let input = Val { name: state.name.clone(), data_type: DataType::Float16, dims: state.dims.clone() };
        self.operations.push(proto::Operation {
            r#type: "write_state".into(),
            inputs: arguments(&[("input", &[&input]), ("data", &[data])]),
            outputs: vec![],
            attributes: BTreeMap::from([("name".to_string(), string_value(name))]),
        });
    }

    /// A constant vector of int32.
    pub fn ints(&mut self, name: &str, values: &[i32]) -> Val {
        let ints = tensor_value::Value::Ints(proto::RepeatedInts { values: values.into() });
        self.constant(name, DataType::Int32, &[values.len() as u64], immediate(ints))
    }

    /// Ends the function: its features for the model's description, and its code. The result has `output`'s name.
    pub fn finish(
        self,
        name: &str,
        output: &Val,
        about: &str,
    ) -> (proto::FunctionDescription, proto::Function) {
        let description = proto::FunctionDescription {
            name: name.into(),
            input: self.input_features,
            output: vec![feature(&output.name, about, array_feature(output.data_type, &output.dims))],
            state: self.state_features,
        };
        let block = proto::Block { outputs: vec![output.name.clone()], operations: self.operations };
        let function = proto::Function {
            inputs: self.parameters,
            opset: OPSET.into(),
            block_specializations: BTreeMap::from([(OPSET.to_string(), block)]),
        };
        (description, function)
    }

    fn elementwise(&mut self, r#type: &str, name: &str, x: &Val, y: &Val) -> Val {
        let dims = broadcast(&x.dims, &y.dims);
        self.operation(r#type, name, &[("x", &[x]), ("y", &[y])], x.data_type, dims)
    }

    fn f16(&mut self, name: &str, value: f16) -> Val {
        let bytes = proto::RepeatedBytes { values: value.to_le_bytes().into() };
        self.constant(name, DataType::Float16, &[], immediate(tensor_value::Value::Bytes(bytes)))
    }

    fn int(&mut self, name: &str, value: i32) -> Val {
        let ints = tensor_value::Value::Ints(proto::RepeatedInts { values: vec![value] });
        self.constant(name, DataType::Int32, &[], immediate(ints))
    }

    fn bool(&mut self, name: &str, value: bool) -> Val {
        let bools = tensor_value::Value::Bools(proto::RepeatedBools { values: vec![value] });
        self.constant(name, DataType::Bool, &[], immediate(bools))
    }

    fn string(&mut self, name: &str, value: &str) -> Val {
        let strings = tensor_value::Value::Strings(proto::RepeatedStrings { values: vec![value.into()] });
        self.constant(name, DataType::String, &[], immediate(strings))
    }

    fn constant(&mut self, name: &str, data_type: DataType, dims: &[u64], value: value::Value) -> Val {
        let val = proto::Value { r#type: Some(tensor_type(data_type, dims)), value: Some(value) };
        self.operations.push(proto::Operation {
            r#type: "const".into(),
            inputs: BTreeMap::new(),
            outputs: vec![named(name, tensor_type(data_type, dims))],
            attributes: BTreeMap::from([("name".to_string(), string_value(name)), ("val".to_string(), val)]),
        });
        Val { name: name.into(), data_type, dims: dims.into() }
    }

    fn operation(
        &mut self,
        r#type: &str,
        name: &str,
        inputs: &[(&str, &[&Val])],
        data_type: DataType,
        dims: Vec<u64>,
    ) -> Val {
        self.operations.push(proto::Operation {
            r#type: r#type.into(),
            inputs: arguments(inputs),
            outputs: vec![named(name, tensor_type(data_type, &dims))],
            attributes: BTreeMap::from([("name".to_string(), string_value(name))]),
        });
        Val { name: name.into(), data_type, dims }
    }
}

fn arguments(inputs: &[(&str, &[&Val])]) -> BTreeMap<String, proto::Argument> {
    let argument = |values: &[&Val]| proto::Argument {
        arguments: values.iter().map(|v| proto::Binding { name: v.name.clone() }).collect(),
    };
    inputs.iter().map(|(parameter, values)| (parameter.to_string(), argument(values))).collect()
}

fn broadcast(x: &[u64], y: &[u64]) -> Vec<u64> {
    let rank = x.len().max(y.len());
    let from_end = |dims: &[u64], i: usize| if i < dims.len() { dims[dims.len() - 1 - i] } else { 1 };
    let mut dims: Vec<u64> = (0..rank)
        .map(|i| match (from_end(x, i), from_end(y, i)) {
            (a, b) if a == b || b == 1 => a,
            (1, b) => b,
            (a, b) => panic!("cannot broadcast {a} with {b}"),
        })
        .collect();
    dims.reverse();
    dims
}

fn tensor_type(data_type: DataType, dims: &[u64]) -> proto::ValueType {
    let dimension = |&size| proto::Dimension { constant: Some(proto::ConstantDimension { size }) };
    let tensor = proto::TensorType {
        data_type: data_type.into(),
        rank: dims.len() as i64,
        dimensions: dims.iter().map(dimension).collect(),
    };
    proto::ValueType { r#type: Some(value_type::Type::Tensor(tensor)) }
}

fn array_feature(data_type: DataType, dims: &[u64]) -> proto::feature_type::Type {
    let data_type = match data_type {
        DataType::Float16 => proto::ArrayDataType::Float16,
        DataType::Int32 => proto::ArrayDataType::Int32,
        other => panic!("{other:?} is not the type of a feature here"),
    };
    proto::feature_type::Type::MultiArray(proto::ArrayFeatureType {
        shape: dims.iter().map(|&d| d as i64).collect(),
        data_type: data_type.into(),
    })
}

fn feature(name: &str, about: &str, r#type: proto::feature_type::Type) -> proto::FeatureDescription {
    proto::FeatureDescription {
        name: name.into(),
        short_description: about.into(),
        r#type: Some(proto::FeatureType { r#type: Some(r#type) }),
    }
}

fn named(name: &str, r#type: proto::ValueType) -> proto::NamedValueType {
    proto::NamedValueType { name: name.into(), r#type: Some(r#type) }
}

fn immediate(tensor: tensor_value::Value) -> value::Value {
    let tensor = proto::TensorValue { value: Some(tensor) };
    value::Value::Immediate(proto::ImmediateValue { tensor: Some(tensor) })
}

fn string_value(text: &str) -> proto::Value {
    let strings = tensor_value::Value::Strings(proto::RepeatedStrings { values: vec![text.into()] });
    proto::Value { r#type: Some(tensor_type(DataType::String, &[])), value: Some(immediate(strings)) }
}

fn to_i32(dims: &[u64]) -> Vec<i32> {
    dims.iter()
        .map(|&d| i32::try_from(d).expect("shapes are checked to fit before a graph is built"))
        .collect()
}
