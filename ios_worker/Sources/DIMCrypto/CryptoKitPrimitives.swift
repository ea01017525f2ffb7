// The primitives over Apple's CryptoKit.
#if canImport(CryptoKit)
    import CryptoKit
    import Foundation

    public enum CryptoKitPrimitives: Primitives {
        public typealias Cipher = CryptoKitCipher
        public typealias Hasher = CryptoKitHasher

        public static func sha256(_ bytes: [UInt8]) -> [UInt8] {
            [UInt8](SHA256.hash(data: bytes))
        }

        public static func hmac(key: [UInt8], _ bytes: [UInt8]) -> [UInt8] {
            [UInt8](HMAC<SHA256>.authenticationCode(for: bytes, using: SymmetricKey(data: key)))
        }

        public static func publicKey(of privateKey: [UInt8]) -> [UInt8] {
            [UInt8](pair(privateKey).publicKey.rawRepresentation)
        }

        public static func agree(privateKey: [UInt8], publicKey: [UInt8]) -> [UInt8]? {
            guard let theirs = try? Curve25519.KeyAgreement.PublicKey(rawRepresentation: publicKey),
                let secret = try? pair(privateKey).sharedSecretFromKeyAgreement(with: theirs)
            else { return nil }
            let shared = secret.withUnsafeBytes { [UInt8]($0) }
            return shared.contains { $0 != 0 } ? shared : nil
        }

        private static func pair(_ privateKey: [UInt8]) -> Curve25519.KeyAgreement.PrivateKey {
            do {
                return try Curve25519.KeyAgreement.PrivateKey(rawRepresentation: privateKey)
            } catch {
                preconditionFailure("an X25519 private key is any 32 bytes, these were \(privateKey.count)")
            }
        }
    }

    public final class CryptoKitCipher: AEADCipher {
        private let key: SymmetricKey

        public init(key: [UInt8]) {
            precondition(key.count == keyBytes)
            self.key = SymmetricKey(data: key)
        }

        public func seal(
            number: UInt64, associated: [UInt8], plaintext: UnsafeRawBufferPointer,
            into output: UnsafeMutableRawBufferPointer
        ) {
            precondition(output.count == plaintext.count + tagBytes)
            do {
                let box = try ChaChaPoly.seal(
                    view(plaintext), using: key, nonce: nonce(number), authenticating: associated)
                box.ciphertext.copyBytes(to: output)
                box.tag.copyBytes(to: UnsafeMutableRawBufferPointer(rebasing: output[plaintext.count...]))
            } catch {
                // CryptoKit documents no failure for a right key and nonce; a frame in clear is not an answer to one
                fatalError("ChaChaPoly.seal: \(error)")
            }
        }

        public func open(
            number: UInt64, associated: [UInt8], sealed: UnsafeRawBufferPointer,
            into output: UnsafeMutableRawBufferPointer
        ) -> Bool {
            precondition(output.count + tagBytes == sealed.count)
            let ciphertext = UnsafeRawBufferPointer(rebasing: sealed[..<output.count])
            let tag = UnsafeRawBufferPointer(rebasing: sealed[output.count...])
            guard
                let box = try? ChaChaPoly.SealedBox(
                    nonce: nonce(number), ciphertext: view(ciphertext), tag: view(tag)),
                let plaintext = try? ChaChaPoly.open(box, using: key, authenticating: associated)
            else { return false }
            plaintext.copyBytes(to: output)
            return true
        }

        private func nonce(_ number: UInt64) throws -> ChaChaPoly.Nonce {
            var bytes: [UInt8] = [0, 0, 0, 0]
            withUnsafeBytes(of: number.littleEndian) { bytes.append(contentsOf: $0) }
            return try ChaChaPoly.Nonce(data: bytes)
        }

        /// `bytes` as Data without a copy, for the length of one call.
        private func view(_ bytes: UnsafeRawBufferPointer) -> Data {
            guard let start = bytes.baseAddress, bytes.count > 0 else { return Data() }
            return Data(
                bytesNoCopy: UnsafeMutableRawPointer(mutating: start), count: bytes.count, deallocator: .none)
        }
    }

    public final class CryptoKitHasher: IncrementalHasher {
        private var hasher = SHA256()

        public init() {}

        public func update(_ bytes: UnsafeRawBufferPointer) {
            hasher.update(bufferPointer: bytes)
        }

        public func finish() -> [UInt8] {
            [UInt8](hasher.finalize())
        }
    }
#endif
