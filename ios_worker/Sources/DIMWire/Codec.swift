// One bounded reader for bytes that come from a peer and one writer for those that go to it. Little-endian.
// The reader never reads past the end, never allocates by a number it has not checked, and treats bytes left over as
// an error.

struct Reader {
    private let bytes: [UInt8]
    private(set) var offset: Int

    init(_ bytes: [UInt8], from offset: Int = 0) {
        self.bytes = bytes
        self.offset = offset
    }

    var remaining: Int { bytes.count - offset }

    mutating func u8() throws(RuleBroken) -> UInt8 {
        try need(1)
        defer { offset += 1 }
        return bytes[offset]
    }

    mutating func u16() throws(RuleBroken) -> UInt16 { try integer(UInt16.self) }
    mutating func u32() throws(RuleBroken) -> UInt32 { try integer(UInt32.self) }
    mutating func u64() throws(RuleBroken) -> UInt64 { try integer(UInt64.self) }

    mutating func array(_ count: Int) throws(RuleBroken) -> [UInt8] {
        try need(count)
        defer { offset += count }
        return Array(bytes[offset..<offset + count])
    }

    /// `count` bytes that must be zero.
    mutating func zeros(_ count: Int) throws(RuleBroken) {
        for byte in try array(count) where byte != 0 {
            throw RuleBroken(.reservedNotZero, "at offset \(offset - count)")
        }
    }

    /// A u16 length and that many bytes of UTF-8.
    mutating func string(atMost limit: Int) throws(RuleBroken) -> String {
        let count = Int(try u16())
        guard count <= limit else { throw RuleBroken(.stringTooLong, "\(count) bytes, at most \(limit)") }
        guard let text = String(validating: try array(count), as: UTF8.self) else {
            throw RuleBroken(.notUTF8, "string at offset \(offset - count)")
        }
        return text
    }

    /// Nothing may be left.
    func end() throws(RuleBroken) {
        guard remaining == 0 else { throw RuleBroken(.trailingBytes, "\(remaining) bytes after the message") }
    }

    private mutating func integer<T: FixedWidthInteger>(_: T.Type) throws(RuleBroken) -> T {
        try need(MemoryLayout<T>.size)
        defer { offset += MemoryLayout<T>.size }
        return bytes.withUnsafeBytes { T(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: T.self)) }
    }

    private func need(_ count: Int) throws(RuleBroken) {
        guard count <= remaining else {
            throw RuleBroken(.truncated, "\(count) bytes needed at offset \(offset), \(remaining) left")
        }
    }
}

struct Writer {
    private(set) var bytes: [UInt8] = []

    init(reserving count: Int = 0) { bytes.reserveCapacity(count) }

    mutating func u8(_ value: UInt8) { bytes.append(value) }
    mutating func u16(_ value: UInt16) { integer(value) }
    mutating func u32(_ value: UInt32) { integer(value) }
    mutating func u64(_ value: UInt64) { integer(value) }
    mutating func array(_ value: some Sequence<UInt8>) { bytes.append(contentsOf: value) }
    mutating func zeros(_ count: Int) { bytes.appendZeros(count) }

    /// A u16 length and UTF-8, cut at a character's boundary if there are more than `limit` bytes.
    mutating func string(_ text: String, atMost limit: Int) {
        let kept = shortened(text, toBytes: limit)
        u16(UInt16(kept.utf8.count))
        array(kept.utf8)
    }

    /// Writes the number of bytes there are into a message's header.
    mutating func setLength() { DIMWire.setLength(of: &bytes) }

    private mutating func integer<T: FixedWidthInteger>(_ value: T) {
        withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }
}

extension [UInt8] {
    /// Room for bytes that are written next. Copied from zeros that are there: `repeatElement` goes byte by byte, which
    /// was a seventh of a token's time.
    mutating func appendZeros(_ count: Int) {
        var left = count
        while left > 0 {
            let part = Swift.min(left, zeroBytes.count)
            append(contentsOf: zeroBytes[..<part])
            left -= part
        }
    }
}

private let zeroBytes = [UInt8](repeating: 0, count: 1 << 14)

/// Writes the number of bytes of `message` into its header.
func setLength(of message: inout [UInt8]) {
    let length = UInt32(message.count)
    for index in 0..<4 { message[4 + index] = UInt8(truncatingIfNeeded: length >> (8 * UInt32(index))) }
}

/// The longest beginning of `text` that is whole characters and at most `limit` bytes of UTF-8.
public func shortened(_ text: String, toBytes limit: Int) -> String {
    guard text.utf8.count > limit else { return text }
    var kept = ""
    var count = 0
    for character in text {
        count += character.utf8.count
        if count > limit { break }
        kept.append(character)
    }
    return kept
}

/// `text` as it may be shown to a person: a peer's string cannot move the cursor, hide or reverse what stands around it.
public func shown(_ text: String) -> String {
    var clean = String.UnicodeScalarView()
    for scalar in text.unicodeScalars {
        switch scalar.value {
        case 0x00...0x1F, 0x7F...0x9F, 0x200E, 0x200F, 0x2028...0x202E, 0x2066...0x2069: clean.append("\u{FFFD}")
        default: clean.append(scalar)
        }
    }
    return String(clean)
}
