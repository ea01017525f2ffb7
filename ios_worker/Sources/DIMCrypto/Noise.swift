// Noise_NNpsk0_25519_ChaChaPoly_SHA256, exactly the steps of docs/PROTOCOL.md section 3.3, and no other pattern.
//
//   host   = initiator    message 1:  psk, e     (48 bytes: ephemeral key, tag of the empty payload)
//   worker = responder    message 2:  e, ee      (48 bytes and the payload)
//
// No I/O, no clock; ephemeral keys are handed in, so that the golden vectors can fix them.

/// Why a handshake ended.
public enum NoiseError: Error, Equatable, Sendable {
    /// a message of another length than the pattern's
    case length(Int)
    /// a wrong key, or altered bytes
    case badTag
    /// a Diffie-Hellman result of zeros: the peer sent a point of small order
    case zeroResult
}

/// What both sides hold after the handshake.
public struct NoiseTransport: Sendable, Equatable {
    /// 32 bytes: the host seals with it, the worker opens
    public let hostKey: [UInt8]
    /// 32 bytes: the worker seals with it, the host opens
    public let workerKey: [UInt8]
    /// 32 bytes: names the connection; the same on both sides
    public let handshakeHash: [UInt8]

    /// The first 8 bytes of the handshake hash in hex: how logs on both sides name the connection.
    public var name: String { hex(handshakeHash.prefix(8)) }
}

/// The host's side. Call `message1`, then `readMessage2` once.
public struct NoiseInitiator {
    private var state: SymmetricState
    private let ephemeral: [UInt8]
    /// 48 bytes, to be sent
    public let message1: [UInt8]

    /// - Parameters:
    ///   - psk: 32 bytes
    ///   - ephemeral: 32 random bytes, used for this handshake only
    public init(prologue: [UInt8], psk: [UInt8], ephemeral: [UInt8]) {
        self.init(
            prologue: prologue, psk: psk, ephemeral: ephemeral,
            publicKey: SystemPrimitives.publicKey(of: ephemeral))
    }

    /// A host that sends any 32 bytes as its public key: what a hostile one can do.
    init(prologue: [UInt8], psk: [UInt8], publicKey: [UInt8]) {
        self.init(
            prologue: prologue, psk: psk, ephemeral: [UInt8](repeating: 0, count: keyBytes), publicKey: publicKey)
    }

    private init(prologue: [UInt8], psk: [UInt8], ephemeral: [UInt8], publicKey: [UInt8]) {
        var state = SymmetricState(prologue: prologue)
        state.mixKeyAndHash(psk)
        state.mixEphemeral(publicKey)
        message1 = publicKey + state.sealAndHash([])
        self.state = state
        self.ephemeral = ephemeral
    }

    /// The payload of message 2 and the keys that follow from it.
    public mutating func readMessage2(_ message: [UInt8]) throws(NoiseError) -> (
        payload: [UInt8], transport: NoiseTransport
    ) {
        guard message.count >= keyBytes + tagBytes else { throw .length(message.count) }
        let theirs = [UInt8](message.prefix(keyBytes))
        state.mixEphemeral(theirs)
        guard let shared = SystemPrimitives.agree(privateKey: ephemeral, publicKey: theirs) else {
            throw .zeroResult
        }
        state.mixKey(shared)
        guard let payload = state.openAndHash([UInt8](message.dropFirst(keyBytes))) else { throw .badTag }
        return (payload, state.split())
    }
}

/// The worker's side. `init` reads message 1, with no scalar multiplication before its tag is checked; `writeMessage2`
/// answers it.
public struct NoiseResponder {
    private var state: SymmetricState
    private let theirs: [UInt8]

    public init(prologue: [UInt8], psk: [UInt8], message1: [UInt8]) throws(NoiseError) {
        guard message1.count == keyBytes + tagBytes else { throw .length(message1.count) }
        var state = SymmetricState(prologue: prologue)
        state.mixKeyAndHash(psk)
        theirs = [UInt8](message1.prefix(keyBytes))
        state.mixEphemeral(theirs)
        guard let payload = state.openAndHash([UInt8](message1.dropFirst(keyBytes))), payload.isEmpty else {
            throw .badTag
        }
        self.state = state
    }

    /// Message 2 (48 bytes more than `payload`) and the keys.
    public mutating func writeMessage2(
        ephemeral: [UInt8], payload: [UInt8]
    ) throws(NoiseError) -> (message: [UInt8], transport: NoiseTransport) {
        let publicKey = SystemPrimitives.publicKey(of: ephemeral)
        state.mixEphemeral(publicKey)
        guard let shared = SystemPrimitives.agree(privateKey: ephemeral, publicKey: theirs) else {
            throw .zeroResult
        }
        state.mixKey(shared)
        let message = publicKey + state.sealAndHash(payload)
        return (message, state.split())
    }
}

/// `h`, `ck`, `k` of the Noise specification. Each key seals or opens one payload, so its count is always 0.
private struct SymmetricState {
    private var hash: [UInt8]
    private var chainingKey: [UInt8]
    private var key: [UInt8] = []

    init(prologue: [UInt8]) {
        // the name is longer than a hash, so it is hashed
        hash = SystemPrimitives.sha256(Array("Noise_NNpsk0_25519_ChaChaPoly_SHA256".utf8))
        chainingKey = hash
        mixHash(prologue)
    }

    mutating func mixHash(_ bytes: [UInt8]) {
        hash = SystemPrimitives.sha256(hash + bytes)
    }

    mutating func mixKey(_ input: [UInt8]) {
        let outputs = expand(input, count: 2)
        chainingKey = outputs[0]
        key = outputs[1]
    }

    /// psk: into the chain, the hash and the key
    mutating func mixKeyAndHash(_ input: [UInt8]) {
        let outputs = expand(input, count: 3)
        chainingKey = outputs[0]
        mixHash(outputs[1])
        key = outputs[2]
    }

    /// e: with a psk in the pattern, an ephemeral public key goes into the hash and into the key
    mutating func mixEphemeral(_ publicKey: [UInt8]) {
        mixHash(publicKey)
        mixKey(publicKey)
    }

    mutating func sealAndHash(_ plaintext: [UInt8]) -> [UInt8] {
        let sealed = SystemPrimitives.Cipher(key: key).sealed(number: 0, associated: hash, plaintext)
        mixHash(sealed)
        return sealed
    }

    mutating func openAndHash(_ sealed: [UInt8]) -> [UInt8]? {
        let plaintext = SystemPrimitives.Cipher(key: key).opened(number: 0, associated: hash, sealed)
        mixHash(sealed)
        return plaintext
    }

    func split() -> NoiseTransport {
        let outputs = expand([], count: 2)
        return NoiseTransport(hostKey: outputs[0], workerKey: outputs[1], handshakeHash: hash)
    }

    /// HKDF2 and HKDF3: plain HMAC chaining under the chaining key
    private func expand(_ input: [UInt8], count: Int) -> [[UInt8]] {
        let temporary = SystemPrimitives.hmac(key: chainingKey, input)
        var outputs: [[UInt8]] = []
        for number in 1...count {
            outputs.append(SystemPrimitives.hmac(key: temporary, (outputs.last ?? []) + [UInt8(number)]))
        }
        return outputs
    }
}
