// Hidden rows inside STEP and STEP_DONE: their format, their exponents, and the check that every value is finite.

/// `a` of STEP and STEP_DONE: the type of the elements, and whether each row carries an exponent.
public struct RowFormat: Equatable, Sendable {
    public let dtype: DType
    /// a stored value times 2^exponent of its row is the value
    public let scaled: Bool

    public init(_ dtype: DType, scaled: Bool = false) {
        self.dtype = dtype
        self.scaled = scaled
    }

    public init?(rawValue: UInt8) {
        guard let dtype = DType(rawValue: rawValue & 0x7F) else { return nil }
        self.init(dtype, scaled: rawValue & 0x80 != 0)
    }

    public var rawValue: UInt8 { dtype.rawValue | (scaled ? 0x80 : 0) }
}

/// Rows as they lie in a message.
public struct Rows: Sendable, Equatable {
    public var format: RowFormat
    /// n_rows
    public var count: Int
    /// (n_rows) if the format is scaled, else empty
    public var exponents: [Int8]
    /// (n_rows, n_embd) elements, little-endian; begins at a multiple of 8 in the array it is a slice of
    public var hidden: ArraySlice<UInt8>

    public init(format: RowFormat, count: Int, exponents: [Int8] = [], hidden: ArraySlice<UInt8>) {
        self.format = format
        self.count = count
        self.exponents = exponents
        self.hidden = hidden
    }

    /// How many values are infinite or not a number.
    public var nonFiniteCount: Int { hidden.withUnsafeBytes { countNonFinite($0, format.dtype) } }

    /// Bytes of exponents and hidden together.
    static func bytes(_ format: RowFormat, count: UInt32, nEmbd: Int) -> UInt64 {
        let exponents = format.scaled ? (UInt64(count) + 7) / 8 * 8 : 0
        // 2^32 rows of 2^31 values of 4 bytes still fit
        return exponents + UInt64(count) * UInt64(UInt32(clamping: nEmbd) & 0x7FFF_FFFF) * UInt64(format.dtype.width)
    }

    /// Reads what is left of `message`, whose length has been checked.
    init(from reader: inout Reader, message: [UInt8], format: RowFormat, count: Int) throws(RuleBroken) {
        var exponents: [Int8] = []
        if format.scaled {
            exponents = try reader.array(count).map { Int8(bitPattern: $0) }
            for (row, exponent) in exponents.enumerated() where !Limit.exponent.contains(exponent) {
                throw RuleBroken(.rowExponent, "2^\(exponent) in row \(row)")
            }
            try reader.zeros(padded8(count) - count)
        }
        self.init(format: format, count: count, exponents: exponents, hidden: message[reader.offset...])
    }

    func write(to writer: inout Writer) {
        if format.scaled {
            writer.array(exponents.map { UInt8(bitPattern: $0) })
            writer.zeros(padded8(count) - count)
        }
        writer.array(hidden)
    }
}

/// How many of the little-endian elements in `bytes` are infinite or not a number: those with all exponent bits set.
public func countNonFinite(_ bytes: UnsafeRawBufferPointer, _ dtype: DType) -> Int {
    switch dtype {
    case .f16: countSet(bytes, UInt16(0x7C00))
    case .bf16: countSet(bytes, UInt16(0x7F80))
    case .f32: countSet(bytes, UInt32(0x7F80_0000))
    }
}

private func countSet<T: FixedWidthInteger>(_ bytes: UnsafeRawBufferPointer, _ mask: T) -> Int {
    let count = bytes.count / MemoryLayout<T>.size
    // Several values at once: the exponent's bits plus its lowest one carry into the sign's place exactly if all are set,
    // and no further.
    let lowest = mask & ~(mask << 1)
    let (masks, lowests) = (spread(mask), spread(lowest))
    let words = bytes.count / 8
    var found: UInt64 = 0
    for word in 0..<words {
        found |= (bytes.loadUnaligned(fromByteOffset: 8 * word, as: UInt64.self) & masks) &+ lowests
    }
    let signs = spread(T(1) << (T.bitWidth - 1))
    if found & signs == 0, words * 8 == bytes.count { return 0 }
    var total = 0
    for index in 0..<count {
        let element = bytes.loadUnaligned(fromByteOffset: index * MemoryLayout<T>.size, as: T.self)
        total += T(littleEndian: element) & mask == mask ? 1 : 0
    }
    return total
}

/// `value` in every lane of a word.
private func spread<T: FixedWidthInteger>(_ value: T) -> UInt64 {
    stride(from: 0, to: 64, by: T.bitWidth).reduce(0) { $0 | UInt64(truncatingIfNeeded: value) << UInt64($1) }
}
