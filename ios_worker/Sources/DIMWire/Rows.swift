// Hidden rows inside STEP and STEP_DONE: their format, and the check that every value is finite.

/// `a` of STEP and STEP_DONE: the type of the elements.
public struct RowFormat: Equatable, Sendable {
    public let dtype: DType

    public init(_ dtype: DType) {
        self.dtype = dtype
    }

    public init?(rawValue: UInt8) {
        guard let dtype = DType(rawValue: rawValue) else { return nil }
        self.init(dtype)
    }

    public var rawValue: UInt8 { dtype.rawValue }
}

/// Rows as they lie in a message.
public struct Rows: Sendable, Equatable {
    public var format: RowFormat
    /// n_rows
    public var count: Int
    /// row after row, each its parts, little-endian; begins at a multiple of 8 in the array it is a slice of
    public var hidden: ArraySlice<UInt8>

    public init(format: RowFormat, count: Int, hidden: ArraySlice<UInt8>) {
        self.format = format
        self.count = count
        self.hidden = hidden
    }

    /// How many numbers are infinite or not a number; what is no number is passed over.
    public func nonFiniteCount(_ layout: Layout) -> Int {
        if layout.parts.count == 1, layout.parts[0].kind != .i32, layout.parts[0].dtype(in: format) == format.dtype {
            return hidden.withUnsafeBytes { countNonFinite($0, format.dtype) }
        }
        let parts = layout.parts.map { ($0.dtype(in: format), Int($0.bytes(format))) }
        return hidden.withUnsafeBytes { all in
            var total = 0
            var offset = 0
            while offset < all.count {
                for (dtype, bytes) in parts {
                    let part = UnsafeRawBufferPointer(rebasing: all[offset..<offset + bytes])
                    if let dtype { total += countNonFinite(part, dtype) }
                    offset += bytes
                }
            }
            return total
        }
    }

    /// Bytes of so many rows; more than any message has where that is so.
    static func bytes(_ format: RowFormat, count: UInt32, _ layout: Layout) -> UInt64 {
        // 2^32 rows of 2^31 bytes still fit
        layout.bytes(format).map { UInt64(count) * $0 } ?? .max
    }

    /// Reads what is left of `message`, whose length has been checked.
    init(from reader: inout Reader, message: [UInt8], format: RowFormat, count: Int) throws(RuleBroken) {
        self.init(format: format, count: count, hidden: message[reader.offset...])
    }

    func write(to writer: inout Writer) {
        writer.array(hidden)
    }
}

extension Part {
    /// What its numbers are in rows of this format; nil: they are none.
    func dtype(in format: RowFormat) -> DType? {
        switch kind {
        case .f16: .f16
        case .f32: format.dtype == .f16 && mayRound ? .f16 : .f32
        case .i32: nil
        }
    }
}

/// How many of the little-endian elements in `bytes` are infinite or not a number: those with all exponent bits set.
public func countNonFinite(_ bytes: UnsafeRawBufferPointer, _ dtype: DType) -> Int {
    switch dtype {
    case .f16: countSet(bytes, UInt16(0x7C00))
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
