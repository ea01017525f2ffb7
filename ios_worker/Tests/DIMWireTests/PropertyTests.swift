// What must hold for all inputs, tried with many seeded ones: no bytes crash a reader, what is read is written back as it
// was, splits change nothing, books never go wrong.
import DIMCrypto
import Testing

@testable import DIMWire

@Suite struct PropertyTests {
    @Test func whatIsReadIsWrittenBackAsItWas() throws {
        // mutated golden messages: most are refused, each with a rule; those that are not must be exactly what they say
        var generator = SeededGenerator(seed: 1)
        let good = try Json.read("messages")["good"].list.map { ($0["hex"].bytes, $0["shape"].shape) }
        var read = 0
        for _ in 0..<40_000 {
            var (bytes, shape) = good.randomElement(using: &generator)!
            for _ in 0..<Int.random(in: 1...3, using: &generator) {
                switch Int.random(in: 0..<4, using: &generator) {
                case 0:
                    bytes[Int.random(in: 0..<bytes.count, using: &generator)] ^=
                        1 << UInt8.random(in: 0..<8, using: &generator)
                case 1:
                    bytes[Int.random(in: 0..<bytes.count, using: &generator)] = [0, 1, 0x7F, 0x80, 0xFF].randomElement(
                        using: &generator)!
                case 2: if bytes.count > 9 { bytes.removeLast(Int.random(in: 1..<bytes.count - 8, using: &generator)) }
                default: bytes.append(.random(in: .min ... .max, using: &generator))
                }
            }
            if Bool.random(using: &generator) { setLength(of: &bytes) }
            guard let message = try? Message(decoding: bytes, shape: shape) else { continue }
            read += 1
            // a code of ERROR that is not known is read as INTERNAL
            if case .error = message { continue }
            if case .stepFailed = message { continue }
            #expect(message.encoded() == bytes)
        }
        #expect(read > 1000)
    }

    @Test func noBytesCrashTheReader() {
        var generator = SeededGenerator(seed: 2)
        for _ in 0..<40_000 {
            var bytes = (0..<Int.random(in: 0..<200, using: &generator)).map { _ in
                UInt8.random(in: .min ... .max, using: &generator)
            }
            if !bytes.isEmpty { bytes[0] = Kind.allCases.randomElement(using: &generator)!.rawValue }
            if bytes.count >= 8, Bool.random(using: &generator) { setLength(of: &bytes) }
            _ = try? Message(decoding: bytes, shape: .hidden(Int.random(in: 0...8, using: &generator)))
        }
    }

    @Test func garbageNeverGetsBeyondTheHandshake() {
        var generator = SeededGenerator(seed: 3)
        for round in 0..<500 {
            var pair = Pair()
            _ = pair.greeted()
            var bytes = (0..<Int.random(in: 1..<300, using: &generator)).map { _ in
                UInt8.random(in: .min ... .max, using: &generator)
            }
            // half of them begin well
            if round % 2 == 0 { bytes = Preamble(purpose: .paired, mark: .none).encoded() + [48, 0] + bytes }
            pair.piece = Int.random(in: 1...100, using: &generator)
            pair.deliver(toWorker: bytes)
            #expect(!pair.worker.isServing)
            #expect(pair.worker.output.count <= 24)
        }
    }

    @Test func garbageInFramesOfTheRightKeyIsRefusedWithARule() {
        // a paired host that sends nonsense: the worker answers ERROR and closes, or goes on; it never traps
        var generator = SeededGenerator(seed: 4)
        for _ in 0..<2000 {
            var pair = Pair.serving()
            var message = (0..<Int.random(in: 8..<120, using: &generator)).map { _ in
                UInt8.random(in: 0...3, using: &generator)
            }
            message[0] = Kind.allCases.randomElement(using: &generator)!.rawValue
            setLength(of: &message)
            pair.host.send(unchecked: message, now: pair.now)
            pair.run()
            if let ending = pair.workerEnding, case .broken(let error) = ending {
                #expect(error.rule.answer != nil || error.rule == .pushItems)
                #expect(pair.host.isClosed)
            }
        }
    }

    @Test func splitsChangeNothing() throws {
        var generator = SeededGenerator(seed: 5)
        let messages =
            try Json.read("messages")["good"].list.map { $0["hex"].bytes }
            + [[UInt8](repeating: 7, count: 70_000), [UInt8](repeating: 8, count: 200_000)].map { long in
                var long = long
                setLength(of: &long)
                return long
            }
        let key = randomBytes(32)
        for _ in 0..<30 {
            let order = messages.shuffled(using: &generator)
            var sealer = FrameSealer(key: key)
            var stream: [UInt8] = []
            for message in order { sealer.seal(message, into: &stream) }
            var opener = FrameOpener(key: key)
            var buffer = ReceiveBuffer()
            var opened: [[UInt8]] = []
            var start = 0
            while start < stream.count {
                let piece = min(
                    stream.count - start,
                    Int.random(in: 1...[3, 100, 60_000].randomElement(using: &generator)!, using: &generator))
                _ = buffer.fill { $0.fill(with: stream[start..<start + piece]) }
                start += piece
                while let message = try opener.next(from: &buffer, limit: 1 << 20) { opened.append(message) }
            }
            #expect(opened == order)
        }
    }

    @Test func booksAgreeWithASimpleModel() throws {
        var generator = SeededGenerator(seed: 6)
        let agreed = try Agreed(host: .ofHost, worker: .ofWorker, chosen: 2)
        let format = RowFormat(.f16)
        for _ in 0..<200 {
            var books = SessionBooks(agreed)
            var lengths: [UInt32] = [0, 0]
            var open: [(UInt32, Int)] = []
            var last: UInt32 = 0
            for _ in 0..<100 {
                let session = UInt32.random(in: 0...2, using: &generator)
                switch Int.random(in: 0..<5, using: &generator) {
                case 0, 1:
                    let known = session < 2 ? lengths[Int(session)] : 0
                    let position = Int.random(in: 0..<8, using: &generator) == 0 ? known + 1 : known
                    let count = UInt32.random(in: 0...9, using: &generator)
                    let right =
                        session < 2 && position == known && (1...8).contains(count) && position + count <= 32
                        && open.count < 2
                    let span = Span(session: session, position: position, count: count)
                    let done = (try? books.step(id: last + 1, rows: Int(count), format: format, spans: [span])) != nil
                    #expect(done == right)
                    if right {
                        lengths[Int(session)] += count
                        last += 1
                        open.append((last, Int(count)))
                    }
                case 2:
                    let (id, rows) = open.first ?? (last, 1)
                    let done = (try? books.stepDone(id: id, rows: rows, format: format)) != nil
                    #expect(done == !open.isEmpty)
                    if done { open.removeFirst() }
                case 3:
                    let position = UInt32.random(in: 0...33, using: &generator)
                    let right = session < 2 && position <= lengths[Int(session)]
                    #expect(((try? books.rewind(session: session, position: position)) != nil) == right)
                    if right { lengths[Int(session)] = position }
                default:
                    #expect(((try? books.end(session: session)) != nil) == (session < 2))
                    if session < 2 { lengths[Int(session)] = 0 }
                }
                #expect(lengths == [books.length(of: 0), books.length(of: 1)])
                #expect(books.inFlight == open.count)
            }
        }
    }

    @Test func stringsAreShownWithoutTricks() {
        #expect(shown("a\u{1B}[2Jb\u{202E}c\u{2028}d\u{7F}") == "a\u{FFFD}[2Jb\u{FFFD}c\u{FFFD}d\u{FFFD}")
        #expect(shown("Zoë's iPhone 📱") == "Zoë's iPhone 📱")
        #expect(shortened("ëë", toBytes: 3) == "ë")
        #expect(shortened("📱📱", toBytes: 7) == "📱")
        #expect(shortened("abc", toBytes: 3) == "abc")
    }
}
