// A host and a worker in memory, with simulated time: no sockets, no ports, no sleeps. Bytes pass in pieces of any
// size, and a test may alter, drop or repeat them on their way.
import DIMCrypto
import Testing

@testable import DIMWire

struct Pair {
    var host: HostConnection
    var worker: WorkerConnection
    var now: Milliseconds = 1_000_000
    var hostEvents: [HostEvent] = []
    var workerEvents: [WorkerEvent] = []
    /// bytes per piece in which everything travels
    var piece = Int.max
    /// what the worker's side of a HELLO does
    var accepting = true

    static let key = PairKey([UInt8](repeating: 0x5A, count: 32))!

    init(
        _ purpose: HostConnection.Purpose = .serve(Terms.ofHost), key: PairKey = Pair.key,
        terms: Terms = .ofWorker, secrets: WorkerSecrets = WorkerSecrets(keys: [Pair.key]),
        versions: ClosedRange<UInt16> = 2...2, crowded: Bool = false
    ) {
        host = HostConnection(purpose: purpose, key: key, dialledAt: now, versions: versions)
        worker = WorkerConnection(terms: terms, secrets: secrets, acceptedAt: now, crowded: crowded)
    }

    /// A pair that has agreed and serves.
    static func serving(host: Terms = .ofHost, worker: Terms = .ofWorker) -> Pair {
        var pair = Pair(.serve(host), terms: worker)
        pair.run()
        return pair
    }

    /// The host's first flight, taken off its output, once the worker has greeted.
    mutating func greeted() -> [UInt8] {
        let greeting = worker.output
        worker.sent()
        deliver(toHost: greeting)
        defer { host.sent() }
        return host.output
    }

    /// Passes bytes to and fro until nothing moves.
    mutating func run() {
        while true {
            pollBoth()
            let toWorker = host.output
            let toHost = worker.output
            host.sent()
            worker.sent()
            if toWorker.isEmpty && toHost.isEmpty { return }
            deliver(toWorker: toWorker)
            deliver(toHost: toHost)
        }
    }

    mutating func deliver(toWorker bytes: [UInt8]) {
        for part in pieces(bytes) {
            worker.receive(now: now) { $0.fill(with: part) }
            pollWorker()
        }
    }

    mutating func deliver(toHost bytes: [UInt8]) {
        for part in pieces(bytes) {
            host.receive(now: now) { $0.fill(with: part) }
            while let event = host.poll(now: now) { hostEvents.append(event) }
        }
    }

    mutating func pollBoth() {
        pollWorker()
        while let event = host.poll(now: now) { hostEvents.append(event) }
    }

    mutating func pollWorker() {
        while let event = worker.poll(now: now) {
            workerEvents.append(event)
            if accepting, case .hello = event { worker.accept(now: now) }
        }
    }

    var workerEnding: Ending? { workerEvents.ending { if case .closed(let ending) = $0 { ending } else { nil } } }
    var hostEnding: Ending? { hostEvents.ending { if case .closed(let ending) = $0 { ending } else { nil } } }

    /// The rule by which the worker closed the connection.
    var brokenAtWorker: Rule? { if case .broken(let error) = workerEnding { error.rule } else { nil } }
    var brokenAtHost: Rule? { if case .broken(let error) = hostEnding { error.rule } else { nil } }

    /// The code of the ERROR that the host got.
    var codeAtHost: ErrorCode? { if case .peerFailed(let report) = hostEnding { report.code } else { nil } }

    private func pieces(_ bytes: [UInt8]) -> [ArraySlice<UInt8>] {
        // not more at once than the receive buffer is sure to take
        let size = min(piece, 65_536)
        return stride(from: 0, to: bytes.count, by: size).map { bytes[$0..<min($0 + size, bytes.count)] }
    }
}

extension Array {
    func ending(_ pick: (Element) -> Ending?) -> Ending? { compactMap(pick).last }
}

extension UnsafeMutableRawBufferPointer {
    /// Copies `bytes` to the beginning; their number.
    func fill(with bytes: some Collection<UInt8>) -> Int {
        precondition(bytes.count <= count)
        copyBytes(from: bytes)
        return bytes.count
    }
}

extension Terms {
    static var ofWorker: Terms {
        var terms = Terms()
        terms.dtypes = [.f16, .f32]
        terms.role = .middle
        terms.instance = 77
        terms.shape = .hidden(8)
        terms.takeBack = .max
        terms.modelBlocks = 28
        terms.firstBlock = 11
        terms.lastBlock = 16
        terms.nCtx = 64
        terms.maxRows = 16
        terms.maxSessions = 4
        terms.maxInFlight = 4
        terms.model = Digest([UInt8](repeating: 1, count: 32))!
        terms.slice = Digest([UInt8](repeating: 2, count: 32))!
        terms.parameters = Digest([UInt8](repeating: 3, count: 32))!
        terms.arch = "qwen2"
        terms.software = "dim-worker-swift 0.1.0"
        terms.name = "a phone"
        return terms
    }

    static var ofHost: Terms {
        var terms = Terms.ofWorker
        terms.dtypes = .f16
        terms.instance = 99
        terms.nCtx = 32
        terms.takeBack = 0
        terms.maxRows = 8
        terms.maxSessions = 2
        terms.maxInFlight = 2
        terms.software = "dim-host 0.1.0"
        terms.name = "a desk"
        return terms
    }
}

/// `count` rows of small integers as F16.
func f16Rows(_ count: Int, nEmbd: Int = 8, first: Int = 1) -> Rows {
    var bytes: [UInt8] = []
    for value in 0..<count * nEmbd {
        // integers up to 2048 are exact: 0x3C00 is 1, and these bit patterns are simply distinct finite values
        let bits = UInt16(0x3C00 + (value + first) % 1024)
        bytes.append(UInt8(bits & 0xFF))
        bytes.append(UInt8(bits >> 8))
    }
    return Rows(format: RowFormat(.f16), count: count, hidden: bytes[...])
}

/// A generator with a seed: what fails once fails again.
struct SeededGenerator: RandomNumberGenerator {
    private var state: UInt64

    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        // SplitMix64
        state &+= 0x9E37_79B9_7F4A_7C15
        var word = state
        word = (word ^ (word >> 30)) &* 0xBF58_476D_1CE4_E5B9
        word = (word ^ (word >> 27)) &* 0x94D0_49BB_1331_11EB
        return word ^ (word >> 31)
    }
}

/// Records that something did not come, as a statement that can be returned.
func missed(_ what: String) { Issue.record(Comment(rawValue: what)) }
