// What is said in clear before everything else (docs/PROTOCOL.md section 3.1, 3.2): layouts and checks, no states.
import DIMCrypto

/// The first 32 bytes on a connection: a worker's.
public struct Greeting: Equatable, Sendable {
    public static let bytes = 32

    public var lowest: UInt16
    public var highest: UInt16
    /// 16 random bytes, others on each connection
    public var nonce: [UInt8]

    public init(lowest: UInt16 = protocolVersion, highest: UInt16 = protocolVersion, nonce: [UInt8]) {
        self.lowest = lowest
        self.highest = highest
        self.nonce = nonce
    }

    init(_ bytes: [UInt8]) throws(RuleBroken) {
        var reader = try Preamble.afterMagic(bytes)
        lowest = try reader.u16()
        highest = try reader.u16()
        let reserved = try reader.u32()
        guard lowest <= highest, reserved == 0 else {
            throw RuleBroken(.badGreeting, "versions \(lowest)-\(highest), reserved \(reserved)")
        }
        nonce = try reader.array(KeyMark.nonceBytes)
    }

    func encoded() -> [UInt8] {
        var writer = Writer(reserving: Greeting.bytes)
        writer.array(Preamble.magic)
        writer.u16(lowest)
        writer.u16(highest)
        writer.u32(0)
        writer.array(nonce)
        return writer.bytes
    }
}

/// The first 32 bytes that a host sends.
public struct Preamble: Equatable, Sendable {
    public enum Purpose: UInt8, Sendable {
        case paired = 0
        case pairing = 1
    }

    public static let bytes = 32
    static let magic: [UInt8] = [0xD1, 0x44, 0x49, 0x4D, 0x0D, 0x0A, 0x1A, 0x0A]

    public var lowest: UInt16
    public var highest: UInt16
    public var purpose: Purpose
    /// names the key to a worker; zeros with a pairing code
    public var mark: KeyMark

    public init(lowest: UInt16 = protocolVersion, highest: UInt16 = protocolVersion, purpose: Purpose, mark: KeyMark) {
        self.lowest = lowest
        self.highest = highest
        self.purpose = purpose
        self.mark = purpose == .paired ? mark : .none
    }

    /// What follows the magic, with which everything that is said in clear begins.
    static func afterMagic(_ bytes: [UInt8]) throws(RuleBroken) -> Reader {
        guard Array(bytes.prefix(magic.count)) == magic else { throw RuleBroken(.badMagic, hex(bytes.prefix(8))) }
        return Reader(bytes, from: magic.count)
    }

    /// The versions that a preamble offers; this much keeps its place in every version with this magic.
    static func versions(_ bytes: [UInt8]) throws(RuleBroken) -> ClosedRange<UInt16> {
        var reader = Reader(bytes, from: magic.count)
        let lowest = try reader.u16()
        let highest = try reader.u16()
        guard lowest <= highest else { throw RuleBroken(.badPreamble, "versions \(lowest)-\(highest)") }
        return lowest...highest
    }

    init(_ bytes: [UInt8]) throws(RuleBroken) {
        _ = try Preamble.afterMagic(bytes)
        let versions = try Preamble.versions(bytes)
        lowest = versions.lowerBound
        highest = versions.upperBound
        var reader = Reader(bytes, from: 12)
        let purpose = try reader.u8()
        guard let known = Purpose(rawValue: purpose) else { throw RuleBroken(.badPreamble, "purpose \(purpose)") }
        self.purpose = known
        for byte in try reader.array(3) where byte != 0 { throw RuleBroken(.badPreamble, "reserved bytes") }
        mark = KeyMark(salt: try reader.array(KeyMark.saltBytes), mark: try reader.array(KeyMark.markBytes))
        guard known == .paired || mark == .none else {
            throw RuleBroken(.badPreamble, "a key's mark together with a pairing code")
        }
    }

    func encoded() -> [UInt8] {
        var writer = Writer(reserving: Preamble.bytes)
        writer.array(Preamble.magic)
        writer.u16(lowest)
        writer.u16(highest)
        writer.u8(purpose.rawValue)
        writer.zeros(3)
        writer.array(mark.salt)
        writer.array(mark.mark)
        return writer.bytes
    }
}

/// The clear 24 bytes of a worker's answer.
public struct Answer: Equatable, Sendable {
    public static let bytes = 24

    public var lowest: UInt16 = protocolVersion
    public var highest: UInt16 = protocolVersion
    public var status: HandshakeStatus
    /// 0 unless the status is `go`
    public var chosen: UInt16

    init(status: HandshakeStatus, chosen: UInt16 = 0) {
        self.status = status
        self.chosen = chosen
    }

    init(_ bytes: [UInt8]) throws(RuleBroken) {
        var reader = try Preamble.afterMagic(bytes)
        lowest = try reader.u16()
        highest = try reader.u16()
        guard lowest <= highest else { throw RuleBroken(.badAnswer, "versions \(lowest)-\(highest)") }
        let status = try reader.u8()
        guard let known = HandshakeStatus(rawValue: status) else {
            throw RuleBroken(.badAnswer, "status \(status)")
        }
        self.status = known
        let reserved = try reader.u8()
        chosen = try reader.u16()
        guard reserved == 0, try reader.array(8).allSatisfy({ $0 == 0 }) else {
            throw RuleBroken(.badAnswer, "reserved bytes")
        }
        guard known == .go || chosen == 0 else { throw RuleBroken(.badAnswer, "a version with status \(status)") }
    }

    func encoded() -> [UInt8] {
        var writer = Writer(reserving: Answer.bytes)
        writer.array(Preamble.magic)
        writer.u16(lowest)
        writer.u16(highest)
        writer.u8(status.rawValue)
        writer.u8(0)
        writer.u16(chosen)
        writer.zeros(8)
        return writer.bytes
    }
}

/// The prologue of the Noise handshake: roles, and what was said in clear.
func noisePrologue(greeting: [UInt8], preamble: [UInt8]) -> [UInt8] {
    Array("dim wire: host initiates, worker responds".utf8) + greeting + preamble
}

/// Bytes of Noise message 1 and 2.
let message1Bytes = keyBytes + tagBytes
let message2Bytes = keyBytes + Answer.bytes + tagBytes
