//! The two type tables of the format: what a metadata value may be, and what a tensor's data may be.

use std::fmt;

/// The type of a metadata value, with its number on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ValueType {
    /// unsigned, 1 byte
    U8 = 0,
    /// signed, 1 byte
    I8 = 1,
    /// unsigned, 2 bytes
    U16 = 2,
    /// signed, 2 bytes
    I16 = 3,
    /// unsigned, 4 bytes
    U32 = 4,
    /// signed, 4 bytes
    I32 = 5,
    /// IEEE 754 single
    F32 = 6,
    /// one byte, 0 or 1
    Bool = 7,
    /// u64 length, then that many bytes (any bytes: not every tokenizer's tokens are UTF-8)
    String = 8,
    /// u32 element type, u64 count, then the elements
    Array = 9,
    /// unsigned, 8 bytes
    U64 = 10,
    /// signed, 8 bytes
    I64 = 11,
    /// IEEE 754 double
    F64 = 12,
}

impl ValueType {
    /// The type with this number, if there is one.
    pub const fn from_id(id: u32) -> Option<ValueType> {
        use ValueType::*;
        Some(match id {
            0 => U8,
            1 => I8,
            2 => U16,
            3 => I16,
            4 => U32,
            5 => I32,
            6 => F32,
            7 => Bool,
            8 => String,
            9 => Array,
            10 => U64,
            11 => I64,
            12 => F64,
            _ => return None,
        })
    }

    /// The number on disk.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Bytes of one value, or None where that depends on the value (strings and arrays).
    pub const fn size(self) -> Option<u64> {
        use ValueType::*;
        Some(match self {
            U8 | I8 | Bool => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 => 8,
            String | Array => return None,
        })
    }

    /// The fewest bytes one value can take: what a count is checked against before its elements are read.
    pub const fn min_size(self) -> u64 {
        match self {
            ValueType::String => 8,
            ValueType::Array => 12,
            _ => match self.size() {
                Some(n) => n,
                None => 1,
            },
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use ValueType::*;
        f.write_str(match self {
            U8 => "u8",
            I8 => "i8",
            U16 => "u16",
            I16 => "i16",
            U32 => "u32",
            I32 => "i32",
            F32 => "f32",
            Bool => "bool",
            String => "string",
            Array => "array",
            U64 => "u64",
            I64 => "i64",
            F64 => "f64",
        })
    }
}

macro_rules! tensor_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $text:literal, $block:literal, $bytes:literal;)*) => {
        /// How a tensor's values are encoded: ggml's types that a file may hold, with their numbers on disk.
        ///
        /// Each encodes rows in groups of [`block_len`](Self::block_len) values that take
        /// [`block_bytes`](Self::block_bytes) bytes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        #[allow(non_camel_case_types)]
        pub enum TensorType {
            $($(#[$doc])* $name = $id,)*
        }

        impl TensorType {
            /// Every type there is, by number.
            pub const ALL: &'static [TensorType] = &[$(TensorType::$name,)*];

            /// The type with this number, if ggml has it (and a file may hold it).
            pub const fn from_id(id: u32) -> Option<TensorType> {
                match id {
                    $($id => Some(TensorType::$name),)*
                    _ => None,
                }
            }

            /// ggml's name of it, as in `Q8_0`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(TensorType::$name => $text,)*
                }
            }

            /// Values in one group. A row is a whole number of groups.
            pub const fn block_len(self) -> u64 {
                match self {
                    $(TensorType::$name => $block,)*
                }
            }

            /// Bytes of one group.
            pub const fn block_bytes(self) -> u64 {
                match self {
                    $(TensorType::$name => $bytes,)*
                }
            }
        }
    };
}

tensor_types! {
    /// single
    F32 = 0, "F32", 1, 4;
    /// half
    F16 = 1, "F16", 1, 2;
    /// 4 bits, scale
    Q4_0 = 2, "Q4_0", 32, 18;
    /// 4 bits, scale and minimum
    Q4_1 = 3, "Q4_1", 32, 20;
    /// 5 bits, scale
    Q5_0 = 6, "Q5_0", 32, 22;
    /// 5 bits, scale and minimum
    Q5_1 = 7, "Q5_1", 32, 24;
    /// 8 bits, scale
    Q8_0 = 8, "Q8_0", 32, 34;
    /// 8 bits, scale and sum
    Q8_1 = 9, "Q8_1", 32, 36;
    /// K-quant, 2 bits
    Q2_K = 10, "Q2_K", 256, 84;
    /// K-quant, 3 bits
    Q3_K = 11, "Q3_K", 256, 110;
    /// K-quant, 4 bits
    Q4_K = 12, "Q4_K", 256, 144;
    /// K-quant, 5 bits
    Q5_K = 13, "Q5_K", 256, 176;
    /// K-quant, 6 bits
    Q6_K = 14, "Q6_K", 256, 210;
    /// K-quant, 8 bits
    Q8_K = 15, "Q8_K", 256, 292;
    /// codebook, 2.06 bits
    IQ2_XXS = 16, "IQ2_XXS", 256, 66;
    /// codebook, 2.31 bits
    IQ2_XS = 17, "IQ2_XS", 256, 74;
    /// codebook, 3.06 bits
    IQ3_XXS = 18, "IQ3_XXS", 256, 98;
    /// codebook, 1.56 bits
    IQ1_S = 19, "IQ1_S", 256, 50;
    /// non-linear, 4.5 bits
    IQ4_NL = 20, "IQ4_NL", 32, 18;
    /// codebook, 3.44 bits
    IQ3_S = 21, "IQ3_S", 256, 110;
    /// codebook, 2.56 bits
    IQ2_S = 22, "IQ2_S", 256, 82;
    /// non-linear, 4.25 bits
    IQ4_XS = 23, "IQ4_XS", 256, 136;
    /// integer
    I8 = 24, "I8", 1, 1;
    /// integer
    I16 = 25, "I16", 1, 2;
    /// integer
    I32 = 26, "I32", 1, 4;
    /// integer
    I64 = 27, "I64", 1, 8;
    /// double
    F64 = 28, "F64", 1, 8;
    /// codebook, 1.75 bits
    IQ1_M = 29, "IQ1_M", 256, 56;
    /// the upper half of a single
    BF16 = 30, "BF16", 1, 2;
    /// ternary, 1.69 bits
    TQ1_0 = 34, "TQ1_0", 256, 54;
    /// ternary, 2.06 bits
    TQ2_0 = 35, "TQ2_0", 256, 66;
    /// 4-bit floats, shared power-of-two scale
    MXFP4 = 39, "MXFP4", 32, 17;
    /// 4-bit floats, four 8-bit float scales
    NVFP4 = 40, "NVFP4", 64, 36;
    /// 1 bit, scale
    Q1_0 = 41, "Q1_0", 128, 18;
    /// 2 bits, scale
    Q2_0 = 42, "Q2_0", 64, 18;
}

impl TensorType {
    /// The number on disk.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name of a type that files once held and no current ggml reads.
    pub const fn removed_name(id: u32) -> Option<&'static str> {
        Some(match id {
            4 => "Q4_2",
            5 => "Q4_3",
            31 => "Q4_0_4_4",
            32 => "Q4_0_4_8",
            33 => "Q4_0_8_8",
            36 => "IQ4_NL_4_4",
            37 => "IQ4_NL_4_8",
            38 => "IQ4_NL_8_8",
            _ => return None,
        })
    }

    /// The type with this name, upper or lower case.
    pub fn from_name(name: &str) -> Option<TensorType> {
        TensorType::ALL.iter().copied().find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// Bytes of a row of `n` values, or None where `n` is not a whole number of groups or the product overflows.
    pub const fn row_bytes(self, n: u64) -> Option<u64> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor of these dimensions (`dims[0]` is the row), under the same conditions.
    pub fn tensor_bytes(self, dims: &[u64]) -> Option<u64> {
        let row = self.row_bytes(dims.first().copied().unwrap_or(1))?;
        dims.iter().skip(1).try_fold(row, |bytes, &d| bytes.checked_mul(d))
    }

    /// Whether values are quantised in groups (as opposed to stored one by one).
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
