// The primitives over OpenSSL's libcrypto, for Linux. Every call whose failure would mean "no entropy, no memory or a
// broken library" stops the process with its name: there is no answer on the wire for those, and going on without
// encryption is not one.
#if !canImport(CryptoKit)
    import COpenSSL

    public enum OpenSSLPrimitives: Primitives {
        public typealias Cipher = OpenSSLCipher
        public typealias Hasher = OpenSSLHasher

        public static func sha256(_ bytes: [UInt8]) -> [UInt8] {
            filled(keyBytes) { output in
                require(SHA256(bytes, bytes.count, output) != nil, "SHA256")
            }
        }

        public static func hmac(key: [UInt8], _ bytes: [UInt8]) -> [UInt8] {
            filled(keyBytes) { output in
                var count = UInt32(keyBytes)
                require(
                    HMAC(EVP_sha256(), key, Int32(key.count), bytes, bytes.count, output, &count) != nil, "HMAC")
            }
        }

        public static func publicKey(of privateKey: [UInt8]) -> [UInt8] {
            precondition(privateKey.count == keyBytes)
            guard let pair = EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, nil, privateKey, keyBytes) else {
                fatalError("EVP_PKEY_new_raw_private_key")
            }
            defer { EVP_PKEY_free(pair) }
            return filled(keyBytes) { output in
                var count = keyBytes
                require(EVP_PKEY_get_raw_public_key(pair, output, &count) == 1, "EVP_PKEY_get_raw_public_key")
            }
        }

        public static func agree(privateKey: [UInt8], publicKey: [UInt8]) -> [UInt8]? {
            precondition(privateKey.count == keyBytes && publicKey.count == keyBytes)
            guard let ours = EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, nil, privateKey, keyBytes),
                let theirs = EVP_PKEY_new_raw_public_key(EVP_PKEY_X25519, nil, publicKey, keyBytes)
            else { fatalError("EVP_PKEY_new_raw_*_key") }
            defer {
                EVP_PKEY_free(ours)
                EVP_PKEY_free(theirs)
            }
            guard let context = EVP_PKEY_CTX_new(ours, nil) else { fatalError("EVP_PKEY_CTX_new") }
            defer { EVP_PKEY_CTX_free(context) }
            require(EVP_PKEY_derive_init(context) == 1, "EVP_PKEY_derive_init")
            require(EVP_PKEY_derive_set_peer(context, theirs) == 1, "EVP_PKEY_derive_set_peer")
            var shared = [UInt8](repeating: 0, count: keyBytes)
            var count = keyBytes
            // OpenSSL itself refuses a result of all zeros; other versions of it may not
            guard EVP_PKEY_derive(context, &shared, &count) == 1, shared.contains(where: { $0 != 0 }) else {
                return nil
            }
            return shared
        }
    }

    public final class OpenSSLCipher: AEADCipher {
        private let sealing: OpaquePointer
        private let opening: OpaquePointer

        public init(key: [UInt8]) {
            precondition(key.count == keyBytes)
            guard let sealing = EVP_CIPHER_CTX_new(), let opening = EVP_CIPHER_CTX_new() else {
                fatalError("EVP_CIPHER_CTX_new")
            }
            self.sealing = sealing
            self.opening = opening
            // The key schedule is made once; each frame then only sets its nonce
            require(EVP_EncryptInit_ex(sealing, EVP_chacha20_poly1305(), nil, key, nil) == 1, "EVP_EncryptInit_ex")
            require(EVP_DecryptInit_ex(opening, EVP_chacha20_poly1305(), nil, key, nil) == 1, "EVP_DecryptInit_ex")
        }

        deinit {
            EVP_CIPHER_CTX_free(sealing)
            EVP_CIPHER_CTX_free(opening)
        }

        public func seal(
            number: UInt64, associated: [UInt8], plaintext: UnsafeRawBufferPointer,
            into output: UnsafeMutableRawBufferPointer
        ) {
            precondition(output.count == plaintext.count + tagBytes)
            let target = output.baseAddress!.assumingMemoryBound(to: UInt8.self)
            var written: Int32 = 0
            withNonce(number) { require(EVP_EncryptInit_ex(sealing, nil, nil, nil, $0) == 1, "EVP_EncryptInit_ex") }
            if !associated.isEmpty {
                require(
                    EVP_EncryptUpdate(sealing, nil, &written, associated, Int32(associated.count)) == 1,
                    "EVP_EncryptUpdate")
            }
            if let source = plaintext.baseAddress, plaintext.count > 0 {
                require(
                    EVP_EncryptUpdate(
                        sealing, target, &written, source.assumingMemoryBound(to: UInt8.self),
                        Int32(plaintext.count)) == 1, "EVP_EncryptUpdate")
            }
            require(EVP_EncryptFinal_ex(sealing, target + plaintext.count, &written) == 1, "EVP_EncryptFinal_ex")
            require(
                EVP_CIPHER_CTX_ctrl(
                    sealing, EVP_CTRL_AEAD_GET_TAG, Int32(tagBytes), target + plaintext.count) == 1,
                "EVP_CTRL_AEAD_GET_TAG")
        }

        public func open(
            number: UInt64, associated: [UInt8], sealed: UnsafeRawBufferPointer,
            into output: UnsafeMutableRawBufferPointer
        ) -> Bool {
            precondition(output.count + tagBytes == sealed.count)
            let source = sealed.baseAddress!.assumingMemoryBound(to: UInt8.self)
            var written: Int32 = 0
            withNonce(number) { require(EVP_DecryptInit_ex(opening, nil, nil, nil, $0) == 1, "EVP_DecryptInit_ex") }
            if !associated.isEmpty {
                require(
                    EVP_DecryptUpdate(opening, nil, &written, associated, Int32(associated.count)) == 1,
                    "EVP_DecryptUpdate")
            }
            if let target = output.baseAddress, output.count > 0 {
                require(
                    EVP_DecryptUpdate(
                        opening, target.assumingMemoryBound(to: UInt8.self), &written, source,
                        Int32(output.count)) == 1, "EVP_DecryptUpdate")
            }
            require(
                EVP_CIPHER_CTX_ctrl(
                    opening, EVP_CTRL_AEAD_SET_TAG, Int32(tagBytes),
                    UnsafeMutableRawPointer(mutating: source + output.count)) == 1, "EVP_CTRL_AEAD_SET_TAG")
            var rest: UInt8 = 0
            return EVP_DecryptFinal_ex(opening, &rest, &written) == 1
        }

        private func withNonce(_ number: UInt64, _ body: (UnsafePointer<UInt8>) -> Void) {
            var nonce: (UInt32, UInt32, UInt32) = (
                0, UInt32(truncatingIfNeeded: number).littleEndian,
                UInt32(truncatingIfNeeded: number >> 32).littleEndian
            )
            withUnsafeBytes(of: &nonce) { body($0.baseAddress!.assumingMemoryBound(to: UInt8.self)) }
        }
    }

    public final class OpenSSLHasher: IncrementalHasher {
        private let context: OpaquePointer

        public init() {
            guard let context = EVP_MD_CTX_new() else { fatalError("EVP_MD_CTX_new") }
            self.context = context
            require(EVP_DigestInit_ex(context, EVP_sha256(), nil) == 1, "EVP_DigestInit_ex")
        }

        deinit { EVP_MD_CTX_free(context) }

        public func update(_ bytes: UnsafeRawBufferPointer) {
            require(EVP_DigestUpdate(context, bytes.baseAddress, bytes.count) == 1, "EVP_DigestUpdate")
        }

        public func finish() -> [UInt8] {
            filled(keyBytes) { output in
                require(EVP_DigestFinal_ex(context, output, nil) == 1, "EVP_DigestFinal_ex")
            }
        }
    }

    private func require(_ condition: Bool, _ call: StaticString) {
        if !condition { fatalError("libcrypto: \(call) failed") }
    }

    private func filled(_ count: Int, _ body: (UnsafeMutablePointer<UInt8>) -> Void) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            body(buffer.baseAddress!)
            initialized = count
        }
    }
#endif
