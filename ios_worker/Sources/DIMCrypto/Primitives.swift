// The four primitives the protocol is made of, behind one small protocol, and nothing else: X25519,
// ChaCha20-Poly1305, SHA-256, HMAC-SHA-256. CryptoKit has them on Apple systems, OpenSSL on Linux; both are held to
// the same vectors. What is built from them (Noise, keys, codes) is written once, in the other files of this module.

/// What a system must provide.
public protocol Primitives {
    associatedtype Cipher: AEADCipher
    associatedtype Hasher: IncrementalHasher

    /// SHA-256 of `bytes`: 32 bytes.
    static func sha256(_ bytes: [UInt8]) -> [UInt8]

    /// HMAC-SHA-256: 32 bytes.
    static func hmac(key: [UInt8], _ bytes: [UInt8]) -> [UInt8]

    /// The X25519 public key of 32 private bytes (clamped as RFC 7748 says): 32 bytes.
    static func publicKey(of privateKey: [UInt8]) -> [UInt8]

    /// X25519: 32 bytes, or nil where the result would be all zeros (a public key of small order).
    static func agree(privateKey: [UInt8], publicKey: [UInt8]) -> [UInt8]?
}

/// ChaCha20-Poly1305 under one key, with the nonce that Noise prescribes: four zero bytes and a little-endian count.
/// One object belongs to one direction of one connection and is used by one thread at a time.
public protocol AEADCipher: AnyObject {
    /// - Parameter key: 32 bytes
    init(key: [UInt8])

    /// Writes the ciphertext of `plaintext` and the 16 bytes of its tag into `output`.
    /// - Precondition: `output.count == plaintext.count + 16`
    func seal(
        number: UInt64, associated: [UInt8], plaintext: UnsafeRawBufferPointer,
        into output: UnsafeMutableRawBufferPointer)

    /// Writes the plaintext of `sealed` (ciphertext and tag) into `output`; false if the tag is wrong, and then
    /// nothing in `output` may be used.
    /// - Precondition: `output.count + 16 == sealed.count`
    func open(
        number: UInt64, associated: [UInt8], sealed: UnsafeRawBufferPointer,
        into output: UnsafeMutableRawBufferPointer
    ) -> Bool
}

/// SHA-256 of something too large to hold.
public protocol IncrementalHasher: AnyObject {
    init()
    func update(_ bytes: UnsafeRawBufferPointer)
    /// The digest, 32 bytes; the hasher is spent.
    func finish() -> [UInt8]
}

extension AEADCipher {
    /// `plaintext` sealed, as an array.
    public func sealed(number: UInt64, associated: [UInt8], _ plaintext: [UInt8]) -> [UInt8] {
        var output = [UInt8](repeating: 0, count: plaintext.count + tagBytes)
        plaintext.withUnsafeBytes { source in
            output.withUnsafeMutableBytes {
                seal(number: number, associated: associated, plaintext: source, into: $0)
            }
        }
        return output
    }

    /// `sealed` opened, as an array; nil if the tag is wrong.
    public func opened(number: UInt64, associated: [UInt8], _ sealed: [UInt8]) -> [UInt8]? {
        guard sealed.count >= tagBytes else { return nil }
        var output = [UInt8](repeating: 0, count: sealed.count - tagBytes)
        let good = sealed.withUnsafeBytes { source in
            output.withUnsafeMutableBytes {
                open(number: number, associated: associated, sealed: source, into: $0)
            }
        }
        return good ? output : nil
    }
}

/// Bytes of a Poly1305 tag.
public let tagBytes = 16

/// Bytes of an X25519 key, a SHA-256 digest and a pre-shared key.
public let keyBytes = 32

#if canImport(CryptoKit)
    public typealias SystemPrimitives = CryptoKitPrimitives
#else
    public typealias SystemPrimitives = OpenSSLPrimitives
#endif

/// Random bytes from the system's generator (`arc4random_buf`, `getrandom`).
public func randomBytes(_ count: Int) -> [UInt8] {
    var generator = SystemRandomNumberGenerator()
    return (0..<count).map { _ in UInt8.random(in: .min ... .max, using: &generator) }
}
