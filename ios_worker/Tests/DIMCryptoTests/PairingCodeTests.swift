import Testing

@testable import DIMCrypto

@Suite struct PairingCodeTests {
    @Test func aCodeSurvivesTypingItInAnotherForm() throws {
        for _ in 0..<200 {
            let code = PairingCode.random()
            let sloppy = code.shown.lowercased().replacing("0", with: "o").replacing("1", with: "l")
                .replacing("-", with: " ")
            #expect(try PairingCode(typed: sloppy) == code)
        }
    }

    @Test func everyWrongCharacterIsNoticed() {
        let characters = Array("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
        let right = Array(PairingCode.random().shown)
        for index in right.indices where right[index] != "-" {
            for other in characters where other != right[index] {
                var wrong = right
                wrong[index] = other
                #expect(throws: PairingCodeError.check) { try PairingCode(typed: String(wrong)) }
            }
        }
    }

    @Test func lettersOfOtherAlphabetsAreNotTakenForOurs() {
        // U+0131 and U+017F become I and S when upper-cased by Unicode's rules
        #expect(throws: PairingCodeError.character) { try PairingCode(typed: "\u{131}BCDE-FGHJK-MNPQR-STVWXY") }
        #expect(throws: PairingCodeError.character) { try PairingCode(typed: "ABCDE-FGHJK-MNPQR-\u{17F}TVWXY") }
    }

    @Test func keyFilesHoldSixtyFourDigits() {
        let key = PairKey.random()
        #expect(PairKey(line: key.line + "\n") == key)
        #expect(PairKey(line: key.line.uppercased()) == key)
        #expect(PairKey(line: String(key.line.dropLast())) == nil)
        #expect(PairKey(line: key.line.dropLast() + "g") == nil)
        #expect(PairKey([UInt8](repeating: 1, count: 31)) == nil)
    }
}
