// A blocking host over a real socket, made of HostConnection: the server's other end in its tests.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation
import Testing

@testable import DIMServer

final class TestHost {
    private var wire: HostConnection
    let socket: Socket
    private(set) var events: [HostEvent] = []
    /// the first event that no `wait` has looked at
    private var next = 0
    var ending: Ending? {
        events.compactMap { if case .closed(let ending) = $0 { ending } else { nil } }.last
    }

    init(_ address: String, _ purpose: HostConnection.Purpose, key: PairKey = TestHost.key) throws {
        socket = try Socket.connect(address)
        wire = HostConnection(purpose: purpose, key: key, dialledAt: monotonicMilliseconds())
        flush()
    }

    static let key = PairKey([UInt8](repeating: 0x33, count: 32))!

    /// Runs until an event that `wanted` takes has come, or the connection is closed.
    @discardableResult
    func wait<R>(_ seconds: Double = 5, for wanted: (HostEvent) -> R?) -> R? {
        let until = monotonicMilliseconds() + Milliseconds(seconds * 1000)
        while monotonicMilliseconds() < until {
            pump()
            while next < events.count {
                defer { next += 1 }
                if let result = wanted(events[next]) { return result }
            }
            if wire.isClosed { return nil }
            var received = Socket.Received.nothing
            wire.receive(now: monotonicMilliseconds()) { space in
                received = socket.receive(into: space, waiting: true)
                if case .bytes(let count) = received { return count }
                return 0
            }
            if received == .ended {
                pump()
                wire.disconnected()
            }
        }
        return nil
    }

    private func pump() {
        while let event = wire.poll(now: monotonicMilliseconds()) { events.append(event) }
        if wire.heartbeatDue(now: monotonicMilliseconds()) { wire.heartbeat(now: monotonicMilliseconds()) }
        flush()
    }

    func flush() {
        _ = socket.send(wire.output)
        wire.sent()
    }

    func accepted() -> Agreed? { wait { if case .accepted(_, let agreed) = $0 { agreed } else { nil } } }

    func closed(_ seconds: Double = 5) -> Ending? {
        wait(seconds) { if case .closed(let ending) = $0 { ending } else { nil } }
    }

    /// What the worker says is wrong when it closes; nil if it goes on, or closes for another reason.
    func fault() -> ErrorReport? {
        if case .peerFailed(let report)? = closed() { report } else { nil }
    }

    func step(_ spans: [Span], _ rows: Rows) throws {
        try wire.step(spans: spans, rows: rows, now: monotonicMilliseconds())
        flush()
    }

    func done() -> StepDone? { wait { if case .stepDone(let done) = $0 { done } else { nil } } }

    func rewind(_ session: UInt32, _ position: UInt32) throws {
        try wire.rewind(session: session, position: position, now: monotonicMilliseconds())
        flush()
    }

    func say(_ body: (inout HostConnection) -> Void) {
        body(&wire)
        flush()
    }

    func goodbye() {
        wire.goodbye(.finished, now: monotonicMilliseconds())
        flush()
    }
}

/// What a test wants to know of a server's reports.
final class Reports: @unchecked Sendable {
    private let lock = NSLock()
    private var list: [ServerEvent] = []

    func add(_ event: ServerEvent) {
        lock.lock()
        defer { lock.unlock() }
        list.append(event)
    }

    var all: [ServerEvent] {
        lock.lock()
        defer { lock.unlock() }
        return list
    }

    /// hosts that were connected and are so no more
    var goodbyes: Int { all.filter { if case .disconnected = $0 { true } else { false } }.count }

    /// Waits until `wanted` is among them.
    func eventually(_ wanted: (ServerEvent) -> Bool) -> Bool {
        for _ in 0..<500 {
            if all.contains(where: wanted) { return true }
            usleep(10_000)
        }
        return false
    }
}

final class MemoryKeys: KeyStore, @unchecked Sendable {
    private let lock = NSLock()
    private var kept: [PairKey]
    private var count = 0
    private var unreadable = false

    init(_ keys: [PairKey] = [TestHost.key]) { kept = keys }

    func list() throws -> KeyList {
        try lock.withLock {
            count += 1
            if unreadable { throw KeyStoreError("not now") }
            return KeyList(kept)
        }
    }

    /// Nothing is known of it while `body` runs.
    func unread(while body: () -> Void) {
        lock.withLock { unreadable = true }
        body()
        lock.withLock { unreadable = false }
    }

    /// how often it was asked
    var reads: Int { lock.withLock { count } }

    func removeAll() { lock.withLock { kept = [] } }

    func add(_ key: PairKey, name: String) {
        lock.lock()
        defer { lock.unlock() }
        kept.append(key)
    }
}

/// Keys on a disk that is full the first time.
final class FullOnce: KeyStore, @unchecked Sendable {
    private let kept = MemoryKeys([])
    private let full = Locked(true)

    func list() throws -> KeyList { try kept.list() }

    func add(_ key: PairKey, name: String) throws {
        let isFull = full.withLock { full in
            defer { full = false }
            return full
        }
        if isFull { throw KeyStoreError("no space left on the device") }
        kept.add(key, name: name)
    }
}

/// A server with a fake stage, listening on loopback.
final class TestServer {
    let server: Server
    let reports = Reports()
    let keys: MemoryKeys
    private(set) var address: String

    init(
        stage: StageState? = nil, keys: MemoryKeys = MemoryKeys(), pushStore: PushStore? = nil,
        device: @escaping @Sendable () -> DeviceState = { DeviceState() }, listen: String = "127.0.0.1:0",
        calls: ListenerCalls = ListenerCalls(), keyStore: (any KeyStore)? = nil
    ) throws {
        self.keys = keys
        var configuration = ServerConfiguration(keys: keyStore ?? keys)
        configuration.listen = listen
        configuration.calls = calls
        configuration.name = "a worker"
        configuration.pushStore = pushStore
        configuration.device = device
        let reports = reports
        configuration.report = { reports.add($0) }
        server = Server(configuration)
        server.serve(stage ?? .ready(PackagedStage.fake(shape: .test)))
        address = try server.start()
    }

    func restart() throws { address = try server.start() }

    deinit { server.stop(.shuttingDown) }
}

extension StageShape {
    static var test: StageShape {
        var shape = StageShape()
        shape.arch = "fake"
        shape.modelBlocks = 28
        shape.firstBlock = 11
        shape.lastBlock = 12
        shape.nEmbd = 64
        shape.nCtx = 256
        shape.model = Digest([UInt8](repeating: 1, count: 32))!
        shape.slice = Digest([UInt8](repeating: 2, count: 32))!
        return shape
    }
}

extension Terms {
    static func host(of shape: StageShape = .test, instance: UInt64 = 5) -> Terms {
        var terms = Terms()
        terms.dtypes = .f16
        terms.role = .middle
        terms.instance = instance
        terms.shape = .hidden(shape.nEmbd)
        terms.modelBlocks = UInt32(shape.modelBlocks)
        terms.firstBlock = UInt32(shape.firstBlock)
        terms.lastBlock = UInt32(shape.lastBlock)
        terms.nCtx = UInt32(shape.nCtx)
        terms.maxRows = 128
        terms.maxSessions = 2
        terms.maxInFlight = 4
        terms.model = shape.model
        terms.slice = shape.slice
        terms.arch = shape.arch
        terms.name = "a host"
        terms.software = "test"
        return terms
    }
}

/// `count` rows whose values depend on `seed`.
func rows(_ count: Int, seed: Int, nEmbd: Int = 64) -> Rows {
    var bytes: [UInt8] = []
    for index in 0..<count * nEmbd {
        let bits = UInt16(0x3000 + (index &* 37 &+ seed &* 101) % 4096)
        bytes += [UInt8(bits & 0xFF), UInt8(bits >> 8)]
    }
    return Rows(format: RowFormat(.f16), count: count, hidden: bytes[...])
}

/// What the fake stage must answer, computed anew from the formula in FakePackage.swift.
struct FakeOracle {
    private var keys: [[UInt32]]

    init(blocks: Int = 2) { keys = Array(repeating: [], count: blocks) }

    mutating func rewind(_ position: Int) {
        for block in keys.indices { keys[block] = Array(keys[block][..<position]) }
    }

    mutating func evaluate(_ rows: Rows, nEmbd: Int = 64) -> [UInt8] {
        var output: [UInt8] = []
        let values = Array(rows.hidden)
        for row in 0..<rows.count {
            var x = (0..<nEmbd).map { index in
                let place = 2 * (row * nEmbd + index)
                return UInt16(values[place]) | UInt16(values[place + 1]) << 8
            }
            for block in keys.indices {
                var sum: UInt32 = 0
                for (index, bits) in x.enumerated() { sum &+= UInt32(index + 1) &* UInt32(bits) }
                keys[block].append(sum &* UInt32(keys[block].count + 1))
                let digest = keys[block].reduce(0, &+)
                x = x.enumerated().map { index, bits in
                    Float16((UInt32(bits) &+ digest &+ UInt32(index)) % 2048).bitPattern
                }
            }
            for bits in x { output += [UInt8(bits & 0xFF), UInt8(bits >> 8)] }
        }
        return output
    }
}
