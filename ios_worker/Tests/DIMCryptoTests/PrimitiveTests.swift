// The primitives against published vectors: FIPS 180-2, RFC 4231, RFC 7748, RFC 8439.
import Testing

@testable import DIMCrypto

@Suite struct PrimitiveTests {
    @Test func sha256OfAbc() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        #expect(hex(SystemPrimitives.sha256(Array("abc".utf8))) == expected)
        let hasher = SystemPrimitives.Hasher()
        for byte in "abc".utf8 { withUnsafeBytes(of: byte) { hasher.update($0) } }
        #expect(hex(hasher.finish()) == expected)
    }

    @Test func hmacOfRFC4231() {
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        #expect(
            hex(SystemPrimitives.hmac(key: Array("Jefe".utf8), Array("what do ya want for nothing?".utf8)))
                == expected)
    }

    @Test func x25519OfRFC7748() throws {
        let scalar = try #require(
            unhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"))
        let point = try #require(
            unhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"))
        let expected = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
        #expect(SystemPrimitives.agree(privateKey: scalar, publicKey: point).map { hex($0) } == expected)
        var base = [UInt8](repeating: 0, count: 32)
        base[0] = 9
        #expect(
            SystemPrimitives.agree(privateKey: scalar, publicKey: base)
                == SystemPrimitives.publicKey(of: scalar))
    }

    /// The points of order 1, 2, 4 and 8 and their other encodings: each leads to zeros.
    @Test(arguments: [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ])
    func refusesPointsOfSmallOrder(_ point: String) throws {
        let publicKey = try #require(unhex(point))
        #expect(SystemPrimitives.agree(privateKey: randomBytes(32), publicKey: publicKey) == nil)
    }

    @Test func poly1305OfRFC8439SectionA5() throws {
        // the nonce of A.5 has 0 in its first four bytes and a count in the others, as Noise has
        let key = try #require(unhex("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0"))
        let associated = try #require(unhex("f33388860000000000004e91"))
        let sealed = try #require(
            unhex(
                """
                64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e382d26b0
                bdb7b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c855
                9797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d46a59b5216cde7a4e9
                9040c5a40433225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a
                0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a6727627097a1049e617d91d361094fa68f0ff77987130
                305beaba2eda04df997b714d6c6f2c29a6ad5cb4022b02709beead9d67890cbb22392336fea1851f38
                """.filter { !$0.isWhitespace }))
        let cipher = SystemPrimitives.Cipher(key: key)
        let plaintext = try #require(
            cipher.opened(number: 0x0807_0605_0403_0201, associated: associated, sealed))
        #expect(String(decoding: plaintext, as: UTF8.self).hasPrefix("Internet-Drafts are draft documents"))
        #expect(cipher.sealed(number: 0x0807_0605_0403_0201, associated: associated, plaintext) == sealed)
        for bit in stride(from: 0, to: sealed.count * 8, by: 7) {
            var altered = sealed
            altered[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(cipher.opened(number: 0x0807_0605_0403_0201, associated: associated, altered) == nil)
        }
        #expect(cipher.opened(number: 0, associated: associated, sealed) == nil)
        #expect(cipher.opened(number: 0x0807_0605_0403_0201, associated: [], sealed) == nil)
    }
}
