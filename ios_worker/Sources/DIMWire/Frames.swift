// Frames (docs/PROTOCOL.md section 4): | length: u16 | ciphertext | tag: 16 |, numbered in silence from 0.
// A message begins at the start of a frame; all its frames but the last are full. So the lengths of all frames are
// known from the message's header, and a frame of any other length is refused from its two clear bytes.
import DIMCrypto

/// Bytes as they came from the socket, not yet taken.
struct ReceiveBuffer {
    private var storage: [UInt8]
    private var start = 0
    private var end = 0

    init(capacity: Int = 2 * (2 + Limit.framePlaintext + tagBytes)) {
        storage = [UInt8](repeating: 0, count: capacity)
    }

    var count: Int { end - start }

    /// Lets `body` fill the free space behind the bytes that are there; it returns how many it wrote.
    mutating func fill(_ body: (UnsafeMutableRawBufferPointer) -> Int) -> Int {
        if start == end {
            start = 0
            end = 0
        } else if storage.count - end < storage.count / 2 {
            storage.withUnsafeMutableBytes { all in
                all.baseAddress!.copyMemory(from: all.baseAddress! + start, byteCount: end - start)
            }
            end -= start
            start = 0
        }
        let written = storage.withUnsafeMutableBytes { body(UnsafeMutableRawBufferPointer(rebasing: $0[end...])) }
        end += written
        return written
    }

    /// The byte at `index` after the taken ones.
    subscript(index: Int) -> UInt8 { storage[start + index] }

    /// The next `count` bytes as a copy, taken.
    mutating func take(_ count: Int) -> [UInt8] {
        defer { start += count }
        return Array(storage[start..<start + count])
    }

    /// The next `count` bytes in place, taken after `body`.
    mutating func take<R>(_ count: Int, _ body: (UnsafeRawBufferPointer) -> R) -> R {
        defer { start += count }
        return storage.withUnsafeBytes { body(UnsafeRawBufferPointer(rebasing: $0[start..<start + count])) }
    }

    mutating func drop() {
        start = 0
        end = 0
    }
}

/// The receiving direction: frames in, whole messages out.
struct FrameOpener {
    private let cipher: SystemPrimitives.Cipher
    private var number: UInt64 = 0
    private var message: [UInt8] = []
    /// of the message under way; 0 = none
    private var length = 0

    init(key: [UInt8]) { cipher = SystemPrimitives.Cipher(key: key) }

    /// The next whole message, or nil if more bytes are needed.
    /// - Parameter limit: bytes that a message may have at this moment
    mutating func next(from input: inout ReceiveBuffer, limit: Int) throws(RuleBroken) -> [UInt8]? {
        while input.count >= 2 {
            let plain = Int(input[0]) + Int(input[1]) << 8 - tagBytes
            try check(plain, limit)
            guard input.count >= 2 + plain + tagBytes else { return nil }
            guard number < .max else { throw RuleBroken(.badTag, "no frame number is left") }

            let offset = message.count
            message.appendZeros(plain)
            let good = input.take(2 + plain + tagBytes) { frame in
                message.withUnsafeMutableBytes {
                    cipher.open(
                        number: number, associated: [], sealed: UnsafeRawBufferPointer(rebasing: frame[2...]),
                        into: UnsafeMutableRawBufferPointer(rebasing: $0[offset...]))
                }
            }
            guard good else { throw RuleBroken(.badTag, "frame \(number)") }
            number += 1

            if length == 0 { try beginMessage(plain, limit) }
            if message.count == length {
                defer {
                    message = []
                    length = 0
                }
                return message
            }
        }
        return nil
    }

    /// What the two clear bytes alone say.
    private func check(_ plain: Int, _ limit: Int) throws(RuleBroken) {
        if length > 0 {
            let expected = min(Limit.framePlaintext, length - message.count)
            guard plain == expected else {
                throw RuleBroken(.frameLength, "a frame of \(plain) bytes where \(expected) are left")
            }
        } else {
            guard plain >= Header.bytes else { throw RuleBroken(.frameLength, "a first frame of \(plain) bytes") }
            guard plain <= limit else {
                throw RuleBroken(.tooLong, "a frame of \(plain) bytes, at most \(limit)")
            }
        }
    }

    /// After the first frame of a message: its header says how long it is.
    private mutating func beginMessage(_ plain: Int, _ limit: Int) throws(RuleBroken) {
        let announced = Int(try Header(message).length)
        guard announced <= limit else {
            throw RuleBroken(.tooLong, "a message of \(announced) bytes, at most \(limit)")
        }
        guard plain == min(Limit.framePlaintext, announced) else {
            throw RuleBroken(.frameLength, "a first frame of \(plain) bytes for a message of \(announced)")
        }
        length = announced
        message.reserveCapacity(announced)
    }
}

/// The sending direction: whole messages in, frames out.
struct FrameSealer {
    private let cipher: SystemPrimitives.Cipher
    var number: UInt64 = 0

    init(key: [UInt8]) { cipher = SystemPrimitives.Cipher(key: key) }

    /// Appends the frames of `message` to `output`.
    mutating func seal(_ message: [UInt8], into output: inout [UInt8]) {
        precondition(message.count >= Header.bytes)
        message.withUnsafeBytes { whole in
            var offset = 0
            while offset < whole.count {
                let plain = min(Limit.framePlaintext, whole.count - offset)
                let begin = output.count
                output.appendZeros(2 + plain + tagBytes)
                output[begin] = UInt8(truncatingIfNeeded: plain + tagBytes)
                output[begin + 1] = UInt8(truncatingIfNeeded: (plain + tagBytes) >> 8)
                output.withUnsafeMutableBytes {
                    cipher.seal(
                        number: number, associated: [],
                        plaintext: UnsafeRawBufferPointer(rebasing: whole[offset..<offset + plain]),
                        into: UnsafeMutableRawBufferPointer(rebasing: $0[(begin + 2)...]))
                }
                number += 1
                offset += plain
            }
        }
    }
}
