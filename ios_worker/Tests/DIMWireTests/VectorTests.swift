// The golden vectors of docs/vectors/, which the Rust implementation is held to as well.
import DIMCrypto
import Foundation
import Testing

@testable import DIMWire

/// A value of a vector file. A field that is not there is an error of the test, not a default.
struct Json {
    let value: Any

    static func read(_ name: String) throws -> Json {
        let file = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .appendingPathComponent("../../../docs/vectors/\(name).json")
        return Json(value: try JSONSerialization.jsonObject(with: try Data(contentsOf: file)))
    }

    subscript(_ key: String) -> Json { Json(value: (value as! [String: Any])[key]!) }
    func has(_ key: String) -> Bool { (value as! [String: Any])[key] != nil }
    var list: [Json] { (value as! [Any]).map { Json(value: $0) } }
    var text: String { value as! String }
    var isNull: Bool { value is NSNull }
    var flag: Bool { (value as! NSNumber).boolValue }
    var u64: UInt64 { (value as! NSNumber).uint64Value }
    var u32: UInt32 { UInt32(u64) }
    var u16: UInt16 { UInt16(u64) }
    var u8: UInt8 { UInt8(u64) }
    var int: Int { (value as! NSNumber).intValue }
    var bytes: [UInt8] { unhex(text)! }
    var digest: Digest { Digest(bytes)! }
    var key: PairKey { PairKey(bytes)! }
    var rule: Rule? { isNull ? nil : Rule(rawValue: text)! }
}

@Suite struct VectorTests {
    // MARK: keys.json

    @Test func keysAndCodes() throws {
        let vectors = try Json.read("keys")
        for entry in vectors["keys"].list {
            #expect(hex(entry["key"].key.id.bytes) == entry["id"].text)
            let nonce = entry["nonce"].bytes
            let mark = KeyMark(of: entry["key"].key, nonce: nonce, salt: entry["salt"].bytes)
            #expect(hex(mark.mark) == entry["mark"].text)
            #expect(mark.names(entry["key"].key, nonce: nonce))
            #expect(!mark.names(entry["key"].key, nonce: Array(nonce.reversed())))
        }
        for entry in vectors["codes"].list {
            for typed in entry["typed"].list {
                let code = try PairingCode(typed: typed.text)
                #expect(code.characters == entry["characters"].text)
                #expect(String(code.checkCharacter) == entry["check"].text)
                #expect(code.shown == entry["shown"].text)
                #expect(PairKey(code: code).bytes == entry["pairing_key"].bytes)
            }
        }
        for entry in vectors["bad_codes"].list {
            let expected: PairingCodeError =
                switch entry["rule"].text {
                case "length": .length
                case "character": .character
                default: .check
                }
            #expect(throws: expected) { try PairingCode(typed: entry["typed"].text) }
        }
        for entry in vectors["bad_keys"].list { #expect(PairKey(line: entry.text) == nil, "\(entry.text)") }
        #expect(vectors["keys"].list.count >= 3 && vectors["codes"].list.count >= 3)
    }

    // MARK: noise.json

    @Test func handshakes() throws {
        let cases = try Json.read("noise")["cases"].list
        #expect(cases.count >= 3)
        for entry in cases {
            let preamble = Array(entry["first_flight"].bytes.prefix(Preamble.bytes))
            #expect(try Greeting(entry["greeting"].bytes).nonce == entry["worker_nonce"].bytes)
            #expect(
                noisePrologue(greeting: entry["greeting"].bytes, preamble: preamble) == entry["trace"]["prologue"].bytes
            )
            var host = NoiseInitiator(
                prologue: entry["trace"]["prologue"].bytes, psk: entry["psk"].bytes,
                ephemeral: entry["host_ephemeral"].bytes)
            #expect(preamble + [48, 0] + host.message1 == entry["first_flight"].bytes)
            var worker = try NoiseResponder(
                prologue: entry["trace"]["prologue"].bytes, psk: entry["psk"].bytes, message1: host.message1)
            let clear = Array(entry["answer"].bytes.prefix(Answer.bytes))
            #expect(try Answer(clear).chosen == entry["version"].u16)
            let (message2, ofWorker) = try worker.writeMessage2(
                ephemeral: entry["worker_ephemeral"].bytes, payload: clear)
            #expect(clear + [72, 0] + message2 == entry["answer"].bytes)
            let (payload, ofHost) = try host.readMessage2(message2)
            #expect(payload == clear)
            #expect(ofHost == ofWorker)
            #expect(ofHost.hostKey == entry["trace"]["host_key"].bytes)
            #expect(ofHost.workerKey == entry["trace"]["worker_key"].bytes)
            #expect(ofHost.handshakeHash == entry["trace"]["handshake_hash"].bytes)
        }
    }

    @Test func handshakesThatAWorkerRefuses() throws {
        let vectors = try Json.read("noise")
        let first = vectors["cases"].list[2]
        let entries = vectors["refused_by_worker"].list
        #expect(entries.count >= 16)
        for entry in entries {
            #expect(entry["worker_versions"].list.map(\.u16) == [2, 2])
            for piece in [1, 1000] {
                var pair = Pair(secrets: WorkerSecrets(keys: [first["psk"].key], pairing: first["psk"].key))
                pair.worker = WorkerConnection(
                    terms: .ofWorker, secrets: WorkerSecrets(keys: [first["psk"].key], pairing: first["psk"].key),
                    acceptedAt: pair.now, nonce: first["worker_nonce"].bytes,
                    ephemeral: first["worker_ephemeral"].bytes)
                #expect(pair.worker.output == first["greeting"].bytes)
                pair.worker.sent()
                pair.piece = piece
                pair.deliver(toWorker: entry["bytes"].bytes)
                #expect(pair.brokenAtWorker == entry["rule"].rule, "\(entry["name"].text)")
                #expect(pair.worker.output == entry["answer"].bytes, "\(entry["name"].text)")
            }
        }
    }

    @Test func handshakesThatAHostRefuses() throws {
        let vectors = try Json.read("noise")
        let last = vectors["cases"].list[2]
        for entry in vectors["refused_by_host"].list {
            for piece in [1, 1000] {
                var seen: Rule?
                var host = HostConnection(
                    purpose: .inquire, key: last["psk"].key, dialledAt: 0, salt: last["host_salt"].bytes,
                    ephemeral: last["host_ephemeral"].bytes)
                let bytes = entry["bytes"].bytes
                for start in stride(from: 0, to: bytes.count, by: piece) {
                    host.receive(now: 0) { $0.fill(with: bytes[start..<min(start + piece, bytes.count)]) }
                    while let event = host.poll(now: 0) {
                        if case .closed(.broken(let error)) = event { seen = error.rule }
                    }
                }
                #expect(seen == entry["rule"].rule, "\(entry["name"].text): \(String(describing: seen))")
            }
        }
    }

    // MARK: frames.json

    private func filled(_ head: [UInt8], _ length: Int) -> [UInt8] {
        head + (8..<length).map { UInt8(truncatingIfNeeded: 31 * $0 + 7) }
    }

    @Test func frames() throws {
        let vectors = try Json.read("frames")
        let key = vectors["key"].bytes
        for stream in vectors["streams"].list {
            let messages = stream["messages"].list.map { filled($0["head"].bytes, $0["length"].int) }
            var sealer = FrameSealer(key: key)
            var output: [UInt8] = []
            for message in messages { sealer.seal(message, into: &output) }
            #expect(output.count == stream["stream_length"].int)
            #expect(SystemPrimitives.sha256(output) == stream["stream_sha256"].bytes)
            if stream.has("stream") { #expect(output == stream["stream"].bytes) }
            for piece in [1, 17, 40_000] {
                #expect(opened(output, key, limit: 200_000, piece: piece).messages == messages)
            }
        }
    }

    @Test func framesThatMustBeRefused() throws {
        let vectors = try Json.read("frames")
        let key = vectors["key"].bytes
        let entries = vectors["refused"].list
        #expect(entries.count >= 20)
        for entry in entries {
            var stream: [UInt8] = []
            if entry.has("stream") {
                stream = entry["stream"].bytes
            } else {
                // cut where the format would not cut
                let plain =
                    filled([0x24, 0, 0, 0, 0x70, 0x11, 1, 0], 70_000) + filled([0x24, 0, 0, 0, 8, 0, 0, 0], 8)
                let cipher = SystemPrimitives.Cipher(key: key)
                for (number, range) in entry["frames"]["ranges"].list.enumerated() {
                    let part = Array(plain[range.list[0].int..<range.list[1].int])
                    let sealed = cipher.sealed(number: UInt64(number), associated: [], part)
                    stream += [UInt8(sealed.count & 0xFF), UInt8(sealed.count >> 8)] + sealed
                }
            }
            for piece in [1, 40_000] {
                let (messages, error) = opened(stream, key, limit: entry["limit"].int, piece: piece)
                #expect(messages.count == entry["messages_before"].int, "\(entry["name"].text)")
                #expect(error?.rule == entry["rule"].rule, "\(entry["name"].text)")
            }
        }
    }

    private func opened(
        _ stream: [UInt8], _ key: [UInt8], limit: Int, piece: Int
    ) -> (messages: [[UInt8]], error: RuleBroken?) {
        var opener = FrameOpener(key: key)
        var buffer = ReceiveBuffer()
        var messages: [[UInt8]] = []
        for start in stride(from: 0, to: stream.count, by: piece) {
            _ = buffer.fill { $0.fill(with: stream[start..<min(start + piece, stream.count)]) }
            do throws(RuleBroken) {
                while let message = try opener.next(from: &buffer, limit: limit) { messages.append(message) }
            } catch {
                return (messages, error)
            }
        }
        return (messages, nil)
    }

    // MARK: messages.json

    @Test func messages() throws {
        let entries = try Json.read("messages")["good"].list
        var kinds: Set<Kind> = []
        for entry in entries {
            let bytes = entry["hex"].bytes
            let message = try Message(decoding: bytes, shape: entry["shape"].shape)
            #expect(message == Message(vector: entry["fields"], kind: message.kind), "\(entry["name"].text)")
            #expect(message.encoded() == bytes, "\(entry["name"].text)")
            #expect(entry["name"].text.hasPrefix(message.kind.name))
            if case .pushOffer(let offer) = message {
                #expect(SystemPrimitives.sha256(offer.identifyingBytes) == entry["fields"]["push_id"].bytes)
            }
            kinds.insert(message.kind)
        }
        #expect(kinds == Set(Kind.allCases.filter { !$0.isToCome }))
    }

    @Test func messagesThatMustBeRefused() throws {
        let entries = try Json.read("messages")["bad"].list
        #expect(entries.count >= 48)
        for entry in entries {
            do throws(RuleBroken) {
                let message = try Message(decoding: entry["hex"].bytes, shape: entry["shape"].shape)
                Issue.record("\(entry["name"].text) was read as \(message)")
            } catch {
                #expect(error.rule == entry["rule"].rule, "\(entry["name"].text): \(error)")
            }
        }
    }

    @Test func messagesAtTheWrongTime() throws {
        let entries = try Json.read("messages")["unexpected"].list
        #expect(entries.count >= 21)
        for entry in entries {
            let bytes = entry["hex"].bytes
            var pair: Pair
            switch entry["state"].text {
            case "opening":
                pair = Pair(.inquire)
            case "serving": pair = Pair()
            case "pairing":
                pair = Pair(.pair(name: "a", software: "b"), secrets: WorkerSecrets(pairing: Pair.key))
            case "pushing":
                let items = [PushItem(kind: .selfTest, index: 0, size: 9, digest: .unknown)]
                let offer = PushOffer(
                    model: .unknown, slice: .unknown, firstBlock: 0, lastBlock: 0, items: items, name: "")
                var terms = Terms.ofWorker
                terms.features = .push
                pair = Pair(.push(offer), terms: terms)
            case "closed":
                pair = Pair()
                pair.run()
                pair.host.send(unchecked: Message.goodbye(.finished).encoded(), now: pair.now)
                pair.run()
                #expect(pair.worker.isClosed)
                pair.host.send(unchecked: bytes, now: pair.now)
                pair.run()
                #expect(pair.workerEvents.last == .closed(.goodbye(.finished)))
                continue
            default:
                Issue.record("state \(entry["state"].text)")
                continue
            }
            if entry["receiver"].text == "worker" {
                // the worker is in the state, and this is the next message that it gets
                if entry["state"].text == "pairing" {
                    pair.host = HostConnection(
                        purpose: .pair(name: "", software: ""), key: Pair.key, dialledAt: pair.now)
                    var flight = pair.greeted()
                    pair.deliver(toWorker: flight)
                    flight = pair.worker.output
                    pair.worker.sent()
                    pair.deliver(toHost: flight)
                    // its PAIR_REQUEST is not sent on: frames count from the message under test
                    pair.host.restartSending()
                } else {
                    pair.run()
                    if entry["state"].text == "pushing" {
                        pair.worker.need([0], now: pair.now)
                        pair.run()
                    }
                }
                pair.host.send(unchecked: bytes, now: pair.now)
                pair.run()
                #expect(pair.brokenAtWorker == .unexpected, "\(entry["name"].text)")
                #expect(pair.codeAtHost == .unexpected, "\(entry["name"].text)")
            } else {
                if entry["state"].text == "pairing" {
                    // a host that has not asked is, in this implementation, one that is still in OPENING
                    pair = Pair(.inquire)
                }
                pair.run()
                pair.worker.send(unchecked: bytes, now: pair.now)
                pair.run()
                #expect(pair.brokenAtHost == .unexpected, "\(entry["name"].text)")
            }
        }
    }

    // MARK: terms.json

    @Test func terms() throws {
        let entries = try Json.read("terms").list
        #expect(entries.count >= 34)
        for entry in entries {
            guard case .hello(let host) = try Message(decoding: entry["hello"].bytes, shape: Shape()),
                case .accept(let worker) = try Message(decoding: entry["accept"].bytes, shape: Shape())
            else { return missed("no terms in \(entry["name"].text)") }
            let found = Agreed.mismatches(host: host, worker: worker, chosen: 2)
            if entry["result"].has("refused") {
                #expect(
                    found.map(\.reason.rawValue) == entry["result"]["refused"].list.map(\.u16), "\(entry["name"].text)")
                #expect(throws: found[0]) { try Agreed(host: host, worker: worker, chosen: 2) }
                #expect(!found[0].text.isEmpty)
            } else {
                #expect(found.isEmpty, "\(entry["name"].text)")
                let agreed = try Agreed(host: host, worker: worker, chosen: 2)
                expect(agreed, fits: entry["result"]["agreed"], entry["name"].text)
            }
        }
    }

    private func expect(_ agreed: Agreed, fits vector: Json, _ name: String) {
        let comment = Comment(rawValue: name)
        #expect(agreed.version == vector["version"].u16, comment)
        #expect(agreed.dtype.rawValue == vector["row_dtype"].u8, comment)
        #expect(agreed.shape == vector["shape"].shape, comment)
        #expect(agreed.features.rawValue & ~1 == vector["features"].u32 & ~1, comment)
        #expect(agreed.takeBack == vector["take_back"].u32, comment)
        #expect(agreed.nCtx == vector["n_ctx"].u32, comment)
        #expect(agreed.maxRows == vector["max_rows"].u32, comment)
        #expect(agreed.maxSessions == vector["max_sessions"].u32, comment)
        #expect(agreed.maxInFlight == vector["max_in_flight"].u32, comment)
        #expect(agreed.firstBlock == vector["first_block"].u32, comment)
        #expect(agreed.lastBlock == vector["last_block"].u32, comment)
        #expect(agreed.hostMessageLimit == vector["limit_host_to_worker"].int, comment)
        #expect(agreed.workerMessageLimit == vector["limit_worker_to_host"].int, comment)
    }

    // MARK: sessions.json

    @Test func sessions() throws {
        let vectors = try Json.read("sessions")
        let of = vectors["agreed"]
        var terms = Terms.ofWorker
        terms.shape = of["shape"].shape
        terms.takeBack = of["take_back"].u32
        terms.nCtx = of["n_ctx"].u32
        terms.maxRows = of["max_rows"].u32
        terms.maxSessions = of["max_sessions"].u32
        terms.maxInFlight = of["max_in_flight"].u32
        var host = terms
        host.dtypes = .f16
        let agreed = try Agreed(host: host, worker: terms, chosen: 2)
        expect(agreed, fits: of, "sessions.json")
        for script in vectors["scripts"].list {
            var books = SessionBooks(agreed)
            for event in script["events"].list {
                var broken: Rule?
                do throws(RuleBroken) {
                    switch event["event"].text {
                    case "STEP":
                        try books.step(
                            id: event["step"].u32, rows: event["n_rows"].int,
                            format: RowFormat(rawValue: event["row_format"].u8)!, spans: event["spans"].spans)
                    case "STEP_FAILED": try books.stepFailed(id: event["step"].u32)
                    case "STEP_DONE":
                        try books.stepDone(
                            id: event["step"].u32, rows: event["n_rows"].int,
                            format: RowFormat(rawValue: event["row_format"].u8)!)
                    case "REWIND":
                        try books.rewind(session: event["session"].u32, position: event["position"].u32)
                    default: try books.end(session: event["session"].u32)
                    }
                } catch {
                    broken = error.rule
                }
                #expect(broken == event["rule"].rule, "\(script["name"].text): \(event.value)")
            }
            let lengths = (0..<agreed.maxSessions).map { books.length(of: $0) }
            #expect(lengths == script["lengths"].list.map(\.u32), "\(script["name"].text)")
        }
    }

    // MARK: transcripts.json

    @Test func transcripts() throws {
        let entries = try Json.read("transcripts").list
        #expect(entries.count >= 6)
        for entry in entries {
            // both sides under the fixed keys, to the transport keys
            var noise = NoiseInitiator(
                prologue: noisePrologue(
                    greeting: entry["greeting"].bytes,
                    preamble: Array(entry["first_flight"].bytes.prefix(Preamble.bytes))),
                psk: entry["psk"].bytes, ephemeral: entry["host_ephemeral"].bytes)
            let (_, transport) = try noise.readMessage2(Array(entry["answer"].bytes.dropFirst(26)))

            // a real worker gives the same answer to the same flight
            let pairing = entry["purpose"].int == 1
            let secrets =
                pairing
                ? WorkerSecrets(pairing: entry["psk"].key) : WorkerSecrets(keys: [entry["psk"].key])
            var worker = WorkerConnection(
                terms: .ofWorker, secrets: secrets, acceptedAt: 0, nonce: entry["worker_nonce"].bytes,
                ephemeral: entry["worker_ephemeral"].bytes)
            #expect(worker.output == entry["greeting"].bytes)
            worker.sent()
            worker.receive(now: 0) { $0.fill(with: entry["first_flight"].bytes) }
            while worker.poll(now: 0) != nil {}
            #expect(worker.output == entry["answer"].bytes)

            var sealers = [
                "host": FrameSealer(key: transport.hostKey), "worker": FrameSealer(key: transport.workerKey),
            ]
            var openers = [
                "host": FrameOpener(key: transport.hostKey), "worker": FrameOpener(key: transport.workerKey),
            ]
            for message in entry["messages"].list {
                var wire: [UInt8] = []
                sealers[message["from"].text]!.seal(message["plain"].bytes, into: &wire)
                #expect(wire == message["wire"].bytes, "\(entry["name"].text)")
                var buffer = ReceiveBuffer()
                _ = buffer.fill { $0.fill(with: message["wire"].bytes) }
                let plain = try openers[message["from"].text]!.next(from: &buffer, limit: 1 << 20)
                #expect(plain == message["plain"].bytes, "\(entry["name"].text)")
                let decoded = try Message(decoding: message["plain"].bytes, shape: .hidden(4))
                #expect(decoded.encoded() == message["plain"].bytes)
            }
        }
    }
}

extension Json {
    fileprivate var spans: [Span] {
        list.map { Span(session: $0.list[0].u32, position: $0.list[1].u32, count: $0.list[2].u32) }
    }

    fileprivate var terms: Terms {
        var terms = Terms()
        terms.version = self["version"].u16
        terms.dtypes = DTypes(rawValue: self["dtypes"].u8)
        terms.role = SliceRole(rawValue: self["role"].u8)!
        terms.features = Features(rawValue: self["features"].u32)
        terms.instance = self["instance"].u64
        terms.modelBlocks = self["n_blocks"].u32
        terms.firstBlock = self["first_block"].u32
        terms.lastBlock = self["last_block"].u32
        terms.nCtx = self["n_ctx"].u32
        terms.maxRows = self["max_rows"].u32
        terms.maxSessions = self["max_sessions"].u32
        terms.maxInFlight = self["max_in_flight"].u32
        terms.takeBack = self["take_back"].u32
        terms.machine.engine = Machine.Engine(rawValue: self["engine"].u8)!
        terms.machine.unit = Machine.Unit(rawValue: self["unit"].u8)!
        terms.machine.budget = self["budget_mib"].optional32
        terms.machine.measuredRows = self["measured_rows"].u32
        terms.machine.measuredMicroseconds = self["measured_us"].u32
        terms.input = self["input"].digest
        terms.output = self["output"].digest
        terms.shape = self["shape"].shape
        terms.model = self["model"].digest
        terms.slice = self["slice"].digest
        terms.parameters = self["params"].digest
        terms.arch = self["arch"].text
        terms.software = self["software"].text
        terms.name = self["name"].text
        return terms
    }

    fileprivate var rows: Rows {
        Rows(
            format: RowFormat(rawValue: self["row_format"].u8)!, count: self["n_rows"].int,
            hidden: self["rows"].bytes[...])
    }

    fileprivate var layout: Layout {
        Layout(
            list.map {
                Part(Part.Kind(rawValue: $0.list[0].u8)!, mayRound: $0.list[1].u8 == 1, values: $0.list[2].u32)
            })
    }

    var shape: Shape {
        Shape(input: self["input"].layout, output: self["output"].layout, readsTokens: self["tokens"].flag)
    }

    fileprivate var report: ErrorReport {
        var report = ErrorReport(code: ErrorCode(wire: self["code"].u16), text: self["text"].text)
        report.step = self["step"].optional32 ?? 0
        report.session = self["session"].optional32
        report.block = self["block"].optional32
        report.count = self["count"].u32
        return report
    }

    fileprivate var optional32: UInt32? { isNull ? nil : u32 }
}

extension Message {
    /// The message of a vector's fields.
    fileprivate init(vector: Json, kind: Kind) {
        switch kind {
        case .hello: self = .hello(vector.terms)
        case .accept: self = .accept(vector.terms)
        case .offer: self = .offer(vector.terms)
        case .refuse:
            self = .refuse(
                Refusal(
                    reason: RefusalReason(rawValue: vector["reason"].u16)!, terms: vector["terms"].terms,
                    text: vector["text"].text))
        case .busy: self = .busy(Busy(since: vector["since_ms"].u64, host: vector["name"].text))
        case .inquire: self = .inquire
        case .pairRequest: self = .pairRequest(name: vector["name"].text, software: vector["software"].text)
        case .pairGrant:
            self = .pairGrant(
                PairGrant(key: vector["key"].bytes, name: vector["name"].text, software: vector["software"].text))
        case .pairStored: self = .pairStored
        case .step:
            let tokens = vector["tokens"].list.map { Int32($0.int) }
            var step = Step(
                id: vector["step"].u32, spans: vector["spans"].spans, tokens: tokens, rows: vector.rows)
            step.exact = vector["exact"].flag
            self = .step(step)
        case .stepDone:
            self = .stepDone(
                StepDone(
                    id: vector["step"].u32, computeMicroseconds: vector["compute_us"].u32,
                    waitedMicroseconds: vector["wait_us"].u32, began: vector["began_us"].u64, rows: vector.rows))
        case .rewind: self = .rewind(session: vector["session"].u32, position: vector["position"].u32)
        case .endSession: self = .endSession(vector["session"].u32)
        case .stepFailed:
            let report = vector["void"].flag ? nil : vector.report
            self = .stepFailed(StepFailed(id: vector["step"].u32, report: report))
        case .cancel: self = .cancel(vector["step"].u32)
        case .probe, .probed, .tick: fatalError("no vector has one")
        case .heartbeat:
            var beat = Heartbeat()
            beat.state = Heartbeat.State(rawValue: vector["state"].u8)!
            beat.temperature = Heartbeat.Temperature(rawValue: vector["temperature"].u8)!
            beat.battery = vector["battery"].optional32.map { UInt8($0) }
            beat.memory = vector["free_mib"].optional32
            beat.lastStep = vector["step"].u32
            beat.pauseIn = vector["pause_in_s"].isNull ? nil : vector["pause_in_s"].u16
            self = .heartbeat(beat)
        case .ping: self = .ping(vector["number"].u64)
        case .pong: self = .pong(vector["number"].u64, clock: vector["clock_us"].u64)
        case .error: self = .error(vector.report)
        case .goodbye: self = .goodbye(GoodbyeReason(rawValue: vector["why"].u16)!)
        case .pushOffer:
            self = .pushOffer(
                PushOffer(
                    model: vector["model"].digest, slice: vector["slice"].digest,
                    firstBlock: vector["first_block"].u32, lastBlock: vector["last_block"].u32,
                    items: vector["items"].list.map {
                        PushItem(
                            kind: PushItem.Kind(rawValue: $0["kind"].u8)!, index: $0["index"].u8, size: $0["size"].u64,
                            digest: $0["sha256"].digest)
                    }, name: vector["name"].text))
        case .pushNeed: self = .pushNeed(vector["have"].list.map(\.u64))
        case .pushData:
            self = .pushData(
                PushData(item: vector["item"].u16, offset: vector["offset"].u64, bytes: vector["bytes"].bytes[...]))
        case .pushStored: self = .pushStored(item: vector["item"].u16, bytes: vector["bytes"].u64)
        case .pushResult:
            self = .pushResult(
                PushResult(
                    outcome: PushResult.Outcome(rawValue: vector["outcome"].u8)!,
                    item: vector["item"].isNull ? nil : vector["item"].u16, text: vector["text"].text))
        }
    }
}
