import Testing

@testable import DIMCrypto

@Suite struct NoiseTests {
    private let prologue = Array("a prologue".utf8)
    private let psk = [UInt8](repeating: 7, count: 32)

    @Test func bothSidesEndWithTheSameKeys() throws {
        var host = NoiseInitiator(prologue: prologue, psk: psk, ephemeral: randomBytes(32))
        var worker = try NoiseResponder(prologue: prologue, psk: psk, message1: host.message1)
        let (message2, ofWorker) = try worker.writeMessage2(ephemeral: randomBytes(32), payload: [1, 2, 3])
        #expect(host.message1.count == 48)
        #expect(message2.count == 48 + 3)
        let (payload, ofHost) = try host.readMessage2(message2)
        #expect(payload == [1, 2, 3])
        #expect(ofHost == ofWorker)
        #expect(ofHost.hostKey != ofHost.workerKey)
    }

    @Test func aStrangerFailsAtMessage1() {
        let host = NoiseInitiator(
            prologue: prologue, psk: [UInt8](repeating: 8, count: 32), ephemeral: randomBytes(32))
        #expect(throws: NoiseError.badTag) {
            try NoiseResponder(prologue: prologue, psk: psk, message1: host.message1)
        }
    }

    @Test func anAlteredPrologueFailsAtMessage1() {
        let host = NoiseInitiator(prologue: prologue, psk: psk, ephemeral: randomBytes(32))
        #expect(throws: NoiseError.badTag) {
            try NoiseResponder(prologue: prologue + [0], psk: psk, message1: host.message1)
        }
    }

    @Test func everyAlteredBitOfMessage2IsNoticed() throws {
        let host = NoiseInitiator(prologue: prologue, psk: psk, ephemeral: randomBytes(32))
        var worker = try NoiseResponder(prologue: prologue, psk: psk, message1: host.message1)
        let (message2, _) = try worker.writeMessage2(ephemeral: randomBytes(32), payload: [9])
        for bit in 0..<message2.count * 8 {
            var altered = message2
            altered[bit / 8] ^= 1 << UInt8(bit % 8)
            // X25519 ignores the highest bit of a public key, but the hash does not
            #expect(throws: NoiseError.badTag) {
                var again = host
                _ = try again.readMessage2(altered)
            }
        }
    }

    @Test func aHostThatSendsZerosIsRefused() throws {
        // message 1 with a zero ephemeral key and the tag that a holder of the key can make for it
        let zeros = [UInt8](repeating: 0, count: 32)
        let forged = NoiseInitiator(prologue: prologue, psk: psk, publicKey: zeros)
        var worker = try NoiseResponder(prologue: prologue, psk: psk, message1: forged.message1)
        #expect(throws: NoiseError.zeroResult) {
            try worker.writeMessage2(ephemeral: randomBytes(32), payload: [])
        }
    }

    @Test func messagesOfWrongLengthAreRefused() throws {
        #expect(throws: NoiseError.length(47)) {
            try NoiseResponder(prologue: prologue, psk: psk, message1: [UInt8](repeating: 0, count: 47))
        }
        #expect(throws: NoiseError.length(10)) {
            var host = NoiseInitiator(prologue: prologue, psk: psk, ephemeral: randomBytes(32))
            _ = try host.readMessage2([UInt8](repeating: 0, count: 10))
        }
    }
}
