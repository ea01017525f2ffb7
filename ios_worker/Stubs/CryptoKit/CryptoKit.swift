// Stub: see Stubs/README.md
import Foundation

public protocol ContiguousBytes {
    func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R
}
extension Array: ContiguousBytes where Element == UInt8 {}

public struct SymmetricKey: Sendable {
    public init<D: CryptoKit.ContiguousBytes>(data: D) { stub() }
}

public protocol HashFunction {
    associatedtype Digest: Sequence where Digest.Element == UInt8
    init()
    mutating func update(bufferPointer: UnsafeRawBufferPointer)
    func finalize() -> Digest
}

extension HashFunction {
    public static func hash<D: Sequence>(data: D) -> Digest where D.Element == UInt8 { stub() }
}

public struct SHA256Digest: Sequence, Sendable {
    public func makeIterator() -> AnyIterator<UInt8> { stub() }
}

public struct SHA256: HashFunction, Sendable {
    public init() {}
    public mutating func update(bufferPointer: UnsafeRawBufferPointer) {}
    public func finalize() -> SHA256Digest { stub() }
}

public struct HashedAuthenticationCode<H: HashFunction>: Sequence {
    public func makeIterator() -> AnyIterator<UInt8> { stub() }
}

public struct HMAC<H: HashFunction> {
    public static func authenticationCode<D: Sequence>(
        for data: D, using key: SymmetricKey
    ) -> HashedAuthenticationCode<H> where D.Element == UInt8 { stub() }
}

public struct SharedSecret: Sendable {
    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R { stub() }
}

public enum Curve25519 {
    public enum KeyAgreement {
        public struct PublicKey: Sendable {
            public init<D: CryptoKit.ContiguousBytes>(rawRepresentation: D) throws { stub() }
            public var rawRepresentation: Data { stub() }
        }

        public struct PrivateKey: Sendable {
            public init<D: CryptoKit.ContiguousBytes>(rawRepresentation: D) throws { stub() }
            public var publicKey: PublicKey { stub() }
            public func sharedSecretFromKeyAgreement(with publicKey: PublicKey) throws -> SharedSecret { stub() }
        }
    }
}

public enum ChaChaPoly {
    public struct Nonce: Sendable {
        public init<D: DataProtocol>(data: D) throws { stub() }
    }

    public struct SealedBox: Sendable {
        public init<C: DataProtocol, T: DataProtocol>(nonce: Nonce, ciphertext: C, tag: T) throws { stub() }
        public var ciphertext: Data { stub() }
        public var tag: Data { stub() }
    }

    public static func seal<P: DataProtocol, A: DataProtocol>(
        _ message: P, using key: SymmetricKey, nonce: Nonce?, authenticating authenticatedData: A
    ) throws -> SealedBox { stub() }

    public static func open<A: DataProtocol>(
        _ sealedBox: SealedBox, using key: SymmetricKey, authenticating authenticatedData: A
    ) throws -> Data { stub() }
}

private func stub() -> Never { fatalError("a stub") }
