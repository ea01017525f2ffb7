//! The part of Core ML's protobuf schema that the packages use, declared by hand.
//!
//! Source of the numbers: `mlmodel/format/{Model,MIL,FeatureTypes}.proto` of coremltools (schema as of 9.0, the
//! one iOS 18 reads). Fields this writer never sets are not declared; every declared field carries its number in
//! its attribute, and the schema's own name where Rust's spelling differs. Maps are `BTreeMap`, so that the same
//! model always gives the same bytes.

use std::collections::BTreeMap;

/// `Model`: the root message of `model.mlmodel`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Model {
    /// `specificationVersion`: 9 is iOS 18, the first with states and several functions.
    #[prost(int32, tag = "1")]
    pub specification_version: i32,
    /// What the model takes and gives.
    #[prost(message, optional, tag = "2")]
    pub description: Option<ModelDescription>,
    /// `mlProgram`, the one member of the schema's `oneof Type` in use.
    #[prost(message, optional, tag = "502")]
    pub ml_program: Option<Program>,
}

/// `ModelDescription`. With several functions its own input (1), output (10) and state (13) must be empty.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ModelDescription {
    /// One entry a function.
    #[prost(message, repeated, tag = "20")]
    pub functions: Vec<FunctionDescription>,
    /// `defaultFunctionName`: the one loaded when none is named.
    #[prost(string, tag = "21")]
    pub default_function_name: String,
    /// Texts for people, and the string map.
    #[prost(message, optional, tag = "100")]
    pub metadata: Option<Metadata>,
}

/// `FunctionDescription`: the features of one function.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FunctionDescription {
    /// Name of the function in the program.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Inputs, states not among them.
    #[prost(message, repeated, tag = "2")]
    pub input: Vec<FeatureDescription>,
    /// Outputs.
    #[prost(message, repeated, tag = "3")]
    pub output: Vec<FeatureDescription>,
    /// States.
    #[prost(message, repeated, tag = "6")]
    pub state: Vec<FeatureDescription>,
}

/// `FeatureDescription`: one input, output or state.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FeatureDescription {
    /// Name, the same as in the program.
    #[prost(string, tag = "1")]
    pub name: String,
    /// `shortDescription`, for people.
    #[prost(string, tag = "2")]
    pub short_description: String,
    /// Its type.
    #[prost(message, optional, tag = "3")]
    pub r#type: Option<FeatureType>,
}

/// `FeatureType`: the schema's `oneof Type`, two members of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FeatureType {
    /// Which kind of feature.
    #[prost(oneof = "feature_type::Type", tags = "5, 8")]
    pub r#type: Option<feature_type::Type>,
}

/// The members of [`FeatureType`].
pub mod feature_type {
    /// `FeatureType.Type`
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Type {
        /// `multiArrayType`
        #[prost(message, tag = "5")]
        MultiArray(super::ArrayFeatureType),
        /// `stateType`
        #[prost(message, tag = "8")]
        State(super::StateFeatureType),
    }
}

/// `ArrayFeatureType`: an array of one fixed shape.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ArrayFeatureType {
    /// Dimensions, outermost first.
    #[prost(int64, repeated, tag = "1")]
    pub shape: Vec<i64>,
    /// `dataType`: an [`ArrayDataType`].
    #[prost(enumeration = "ArrayDataType", tag = "2")]
    pub data_type: i32,
}

/// `ArrayFeatureType.ArrayDataType`: 0x10000 = floating point, 0x20000 = integer, plus the number of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ArrayDataType {
    /// `INVALID_ARRAY_DATA_TYPE`
    Invalid = 0,
    /// `FLOAT16`
    Float16 = 65552,
    /// `INT32`
    Int32 = 131104,
}

/// `StateFeatureType`
#[derive(Clone, PartialEq, prost::Message)]
pub struct StateFeatureType {
    /// `arrayType`: fp16 and of fixed shape, nothing else is allowed.
    #[prost(message, optional, tag = "1")]
    pub array_type: Option<ArrayFeatureType>,
}

/// `Metadata`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    /// `shortDescription`
    #[prost(string, tag = "1")]
    pub short_description: String,
    /// `userDefined`: strings by name.
    #[prost(btree_map = "string, string", tag = "100")]
    pub user_defined: BTreeMap<String, String>,
}

/// `MILSpec.Program`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Program {
    /// 1
    #[prost(int64, tag = "1")]
    pub version: i64,
    /// Functions by name.
    #[prost(btree_map = "string, message", tag = "2")]
    pub functions: BTreeMap<String, Function>,
}

/// `MILSpec.Function`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Function {
    /// Inputs and states, in order.
    #[prost(message, repeated, tag = "1")]
    pub inputs: Vec<NamedValueType>,
    /// The operation set, "CoreML8" for iOS 18.
    #[prost(string, tag = "2")]
    pub opset: String,
    /// The body, by operation set.
    #[prost(btree_map = "string, message", tag = "3")]
    pub block_specializations: BTreeMap<String, Block>,
}

/// `MILSpec.Block`: straight-line code.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Block {
    /// Names of the values it gives.
    #[prost(string, repeated, tag = "2")]
    pub outputs: Vec<String>,
    /// In order of execution.
    #[prost(message, repeated, tag = "3")]
    pub operations: Vec<Operation>,
}

/// `MILSpec.Operation`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Operation {
    /// `conv`, `const`, ...
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Arguments by parameter name.
    #[prost(btree_map = "string, message", tag = "2")]
    pub inputs: BTreeMap<String, Argument>,
    /// Values it makes.
    #[prost(message, repeated, tag = "3")]
    pub outputs: Vec<NamedValueType>,
    /// `name`, and `val` of a `const`.
    #[prost(btree_map = "string, message", tag = "5")]
    pub attributes: BTreeMap<String, Value>,
}

/// `MILSpec.Argument`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Argument {
    /// One binding; several for a variadic parameter (the values of a concat).
    #[prost(message, repeated, tag = "1")]
    pub arguments: Vec<Binding>,
}

/// `MILSpec.Argument.Binding`: the schema's `oneof binding` {name 1, value 2}; names only are used here.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Binding {
    /// The value's name.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// `MILSpec.NamedValueType`
#[derive(Clone, PartialEq, prost::Message)]
pub struct NamedValueType {
    /// Name, unique in its function.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<ValueType>,
}

/// `MILSpec.ValueType`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ValueType {
    /// Which kind of value.
    #[prost(oneof = "value_type::Type", tags = "1, 5")]
    pub r#type: Option<value_type::Type>,
}

/// The members of [`ValueType`].
pub mod value_type {
    /// `ValueType.type`
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Type {
        /// `tensorType`
        #[prost(message, tag = "1")]
        Tensor(super::TensorType),
        /// `stateType`
        #[prost(message, tag = "5")]
        State(Box<super::StateType>),
    }
}

/// `MILSpec.StateType`
#[derive(Clone, PartialEq, prost::Message)]
pub struct StateType {
    /// `wrappedType`: what reading the state gives.
    #[prost(message, optional, boxed, tag = "1")]
    pub wrapped_type: Option<Box<ValueType>>,
}

/// `MILSpec.TensorType`
#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorType {
    /// `dataType`
    #[prost(enumeration = "DataType", tag = "1")]
    pub data_type: i32,
    /// Number of dimensions; 0 is a scalar.
    #[prost(int64, tag = "2")]
    pub rank: i64,
    /// Outermost first.
    #[prost(message, repeated, tag = "3")]
    pub dimensions: Vec<Dimension>,
}

/// `MILSpec.DataType`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum DataType {
    /// `UNUSED_TYPE`
    Unused = 0,
    /// `BOOL`
    Bool = 1,
    /// `STRING`
    String = 2,
    /// `FLOAT16`
    Float16 = 10,
    /// `FLOAT32`
    Float32 = 11,
    /// `INT32`
    Int32 = 23,
}

/// `MILSpec.Dimension`: the schema's `oneof dimension`; known sizes only.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Dimension {
    /// `constant`
    #[prost(message, optional, tag = "1")]
    pub constant: Option<ConstantDimension>,
}

/// `MILSpec.Dimension.ConstantDimension`
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConstantDimension {
    /// Number of elements.
    #[prost(uint64, tag = "1")]
    pub size: u64,
}

/// `MILSpec.Value`: a constant.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    /// Its type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<ValueType>,
    /// Where its data is.
    #[prost(oneof = "value::Value", tags = "3, 5")]
    pub value: Option<value::Value>,
}

/// The members of [`Value`](struct@Value).
pub mod value {
    /// `Value.value`
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Value {
        /// `immediateValue`: here.
        #[prost(message, tag = "3")]
        Immediate(super::ImmediateValue),
        /// `blobFileValue`: in the weight file.
        #[prost(message, tag = "5")]
        BlobFile(super::BlobFileValue),
    }
}

/// `MILSpec.Value.ImmediateValue`: the schema's `oneof value`; tensors only.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImmediateValue {
    /// `tensor`
    #[prost(message, optional, tag = "1")]
    pub tensor: Option<TensorValue>,
}

/// `MILSpec.Value.BlobFileValue`
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlobFileValue {
    /// `fileName`, "@model_path/weights/weight.bin"
    #[prost(string, tag = "1")]
    pub file_name: String,
    /// Offset of the blob's metadata record (not of its data) in that file.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
}

/// `MILSpec.TensorValue`
#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorValue {
    /// The elements.
    #[prost(oneof = "tensor_value::Value", tags = "1, 2, 3, 4, 7")]
    pub value: Option<tensor_value::Value>,
}

/// The members of [`TensorValue`].
pub mod tensor_value {
    /// `TensorValue.value`
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Value {
        /// `floats`: fp32
        #[prost(message, tag = "1")]
        Floats(super::RepeatedFloats),
        /// `ints`: int32
        #[prost(message, tag = "2")]
        Ints(super::RepeatedInts),
        /// `bools`
        #[prost(message, tag = "3")]
        Bools(super::RepeatedBools),
        /// `strings`
        #[prost(message, tag = "4")]
        Strings(super::RepeatedStrings),
        /// `bytes`: fp16, little-endian
        #[prost(message, tag = "7")]
        Bytes(super::RepeatedBytes),
    }
}

/// `TensorValue.RepeatedFloats`
#[derive(Clone, PartialEq, prost::Message)]
pub struct RepeatedFloats {
    /// Elements, row-major.
    #[prost(float, repeated, tag = "1")]
    pub values: Vec<f32>,
}

/// `TensorValue.RepeatedInts`
#[derive(Clone, PartialEq, prost::Message)]
pub struct RepeatedInts {
    /// Elements, row-major.
    #[prost(int32, repeated, tag = "1")]
    pub values: Vec<i32>,
}

/// `TensorValue.RepeatedBools`
#[derive(Clone, PartialEq, prost::Message)]
pub struct RepeatedBools {
    /// Elements, row-major.
    #[prost(bool, repeated, tag = "1")]
    pub values: Vec<bool>,
}

/// `TensorValue.RepeatedStrings`
#[derive(Clone, PartialEq, prost::Message)]
pub struct RepeatedStrings {
    /// Elements, row-major.
    #[prost(string, repeated, tag = "1")]
    pub values: Vec<String>,
}

/// `TensorValue.RepeatedBytes`
#[derive(Clone, PartialEq, prost::Message)]
pub struct RepeatedBytes {
    /// Elements, row-major, little-endian.
    #[prost(bytes = "vec", tag = "1")]
    pub values: Vec<u8>,
}
