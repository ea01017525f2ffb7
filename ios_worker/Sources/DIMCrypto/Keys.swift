// Keys of paired devices and the codes that pair them (docs/PROTOCOL.md section 2).

/// The pre-shared key of one pair of host and worker.
public struct PairKey: Equatable, Sendable {
    /// 32 bytes
    public let bytes: [UInt8]

    /// nil unless there are 32 bytes.
    public init?(_ bytes: [UInt8]) {
        guard bytes.count == keyBytes else { return nil }
        self.bytes = bytes
    }

    /// A key of a key file: one line of 64 hexadecimal digits.
    public init?(line: String) {
        let text = line.last?.isNewline == true ? line.dropLast() : line[...]
        guard text.utf8.count == 2 * keyBytes, let bytes = unhex(String(text)) else { return nil }
        self.bytes = bytes
    }

    /// A fresh key.
    public static func random() -> PairKey { PairKey(unchecked: randomBytes(keyBytes)) }

    /// The key of a pairing handshake, from the 20 characters of its code.
    public init(code: PairingCode) {
        bytes = SystemPrimitives.sha256(Array("dim pairing v1".utf8) + Array(code.characters.utf8))
    }

    private init(unchecked bytes: [UInt8]) { self.bytes = bytes }

    /// What names the key in file names and logs; it never crosses the wire.
    public var id: KeyID {
        KeyID([UInt8](SystemPrimitives.sha256(Array("dim key id v1".utf8) + bytes).prefix(KeyID.count)))!
    }

    /// The key as a key file holds it.
    public var line: String { hex(bytes) }
}

/// How a host names its key in clear: otherwise on each connection, so that nobody knows it again by it.
public struct KeyMark: Equatable, Sendable {
    public static let nonceBytes = 16
    public static let saltBytes = 8
    public static let markBytes = 8
    /// of a pairing code
    public static let none = KeyMark(
        salt: [UInt8](repeating: 0, count: saltBytes), mark: [UInt8](repeating: 0, count: markBytes))

    /// the host's, random
    public let salt: [UInt8]
    public let mark: [UInt8]

    public init(salt: [UInt8], mark: [UInt8]) {
        self.salt = salt
        self.mark = mark
    }

    /// The mark of `key` for a worker with this nonce.
    public init(of key: PairKey, nonce: [UInt8], salt: [UInt8] = randomBytes(saltBytes)) {
        self.salt = salt
        let all = SystemPrimitives.hmac(key: key.bytes, Array("dim key mark v2".utf8) + nonce + salt)
        mark = Array(all.prefix(KeyMark.markBytes))
    }

    /// Whether it names `key`. All bytes are looked at, whatever they are.
    public func names(_ key: PairKey, nonce: [UInt8]) -> Bool {
        let right = KeyMark(of: key, nonce: nonce, salt: salt).mark
        return zip(right, mark).reduce(0) { $0 | ($1.0 ^ $1.1) } == 0
    }
}

/// The first 8 bytes of a hash of a key.
public struct KeyID: Hashable, Sendable {
    public static let count = 8
    public static let none = KeyID([UInt8](repeating: 0, count: count))!

    public let bytes: [UInt8]

    public init?(_ bytes: [UInt8]) {
        guard bytes.count == KeyID.count else { return nil }
        self.bytes = bytes
    }
}

/// Why a typed code is none.
public enum PairingCodeError: Error, Equatable, Sendable {
    /// not 21 characters
    case length
    /// a character that is not of the alphabet
    case character
    /// a typing error: the check character does not fit the others
    case check
}

/// A one-time pairing code: 20 characters of Crockford's base 32 (100 random bits) and a check character.
public struct PairingCode: Equatable, Sendable {
    /// the 20 characters, without the check character
    public let characters: String

    /// A fresh code.
    public static func random() -> PairingCode {
        PairingCode(values: randomBytes(length).map { Int($0 & 31) })
    }

    /// A code as a person types it: any case, spaces and hyphens anywhere, O for 0, I and L for 1.
    public init(typed: String) throws(PairingCodeError) {
        var values: [Int] = []
        for character in typed where character != " " && character != "-" {
            let meant: Character =
                switch character {
                case "O", "o": "0"
                case "I", "i", "L", "l": "1"
                case "a"..."z" where character.isASCII: Character(character.uppercased())
                default: character
                }
            guard let value = PairingCode.alphabet.firstIndex(of: meant) else { throw .character }
            values.append(value)
        }
        guard values.count == PairingCode.length + 1 else { throw .length }
        self.init(values: Array(values.dropLast()))
        guard checkCharacter == PairingCode.alphabet[values.last!] else { throw .check }
    }

    private init(values: [Int]) {
        characters = String(values.map { PairingCode.alphabet[$0] })
    }

    /// Luhn mod 32 over the 20 characters, from the right, factor 2 first.
    public var checkCharacter: Character {
        var sum = 0
        var factor = 2
        for character in characters.reversed() {
            let product = factor * PairingCode.alphabet.firstIndex(of: character)!
            sum += product / 32 + product % 32
            factor = 3 - factor
        }
        return PairingCode.alphabet[(32 - sum % 32) % 32]
    }

    /// `ABCDE-FGHJK-MNPQR-STVWXY`: how a screen shows it; the last group has the check character.
    public var shown: String {
        let all = Array(characters) + [checkCharacter]
        return [all[0..<5], all[5..<10], all[10..<15], all[15..<21]].map { String($0) }.joined(separator: "-")
    }

    private static let length = 20
    private static let alphabet = Array("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
}

/// Lower-case hexadecimal digits of `bytes`.
public func hex(_ bytes: some Sequence<UInt8>) -> String {
    var text = ""
    for byte in bytes {
        text.append(digits[Int(byte >> 4)])
        text.append(digits[Int(byte & 15)])
    }
    return text
}

/// The bytes of hexadecimal digits of either case; nil for anything else.
public func unhex(_ text: String) -> [UInt8]? {
    let digits = Array(text.utf8)
    guard digits.count % 2 == 0 else { return nil }
    var bytes: [UInt8] = []
    bytes.reserveCapacity(digits.count / 2)
    for index in stride(from: 0, to: digits.count, by: 2) {
        guard let high = digitValue(digits[index]), let low = digitValue(digits[index + 1]) else { return nil }
        bytes.append(high << 4 | low)
    }
    return bytes
}

private func digitValue(_ digit: UInt8) -> UInt8? {
    switch digit {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): digit - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): digit - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): digit - UInt8(ascii: "A") + 10
    default: nil
    }
}

private let digits = Array("0123456789abcdef")
