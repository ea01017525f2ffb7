// Who stands in the door: hosts that take no bytes, strangers that say nothing, and what they may not hold up.
import DIMCrypto
import DIMPhone
import DIMStage
import DIMWire
import Foundation
import Testing

@testable import DIMServer

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

@Suite(.serialized) struct DoorTests {
    /// Rows so large that a reply does not fit the buffers of two sockets.
    private static var wide: StageShape {
        var shape = StageShape.test
        shape.lastBlock = shape.firstBlock
        shape.nEmbd = 65_536
        shape.nCtx = 512
        return shape
    }

    /// A worker whose connection thread waits for a host that does not read what it was answered.
    private func stuck() throws -> (TestServer, TestHost) {
        let worker = try TestServer(stage: .ready(EchoStage(shape: DoorTests.wide)))
        let host = try TestHost(worker.address, .serve(.host(of: DoorTests.wide)))
        var small: Int32 = 4096
        setsockopt(host.socket.descriptor, SOL_SOCKET, SO_RCVBUF, &small, socklen_t(MemoryLayout<Int32>.size))
        _ = host.accepted()
        let bytes = [UInt8](repeating: 0, count: 128 * 2 * DoorTests.wide.nEmbd)
        try host.step(
            [Span(session: 0, position: 0, count: 128)],
            Rows(format: RowFormat(.f16), count: 128, hidden: bytes[...]))
        // more than heartbeats: the reply has begun to arrive, and most of it has nowhere to go
        var there: Int32 = 0
        for _ in 0..<3000 where there < 1000 {
            usleep(10_000)
            _ = ioctl(host.socket.descriptor, UInt(FIONREAD), &there)
        }
        #expect(there >= 1000)
        usleep(300_000)
        return (worker, host)
    }

    /// Whether `body` returns within what no waiting for the host itself would keep: that is 30 seconds.
    private func returns(_ body: @escaping @Sendable () -> Void) -> Bool {
        let done = DispatchSemaphore(value: 0)
        Thread.start("test") {
            body()
            done.signal()
        }
        return done.wait(timeout: .now() + 10) == .success
    }

    @Test func leavingDoesNotWaitForAHostThatReadsNothing() throws {
        let (worker, host) = try stuck()
        let server = worker.server
        #expect(returns { server.stop(.pausing) })
        // the port is free, and the host hears of it: from the socket, if not from a GOODBYE
        try worker.restart()
        #expect(host.closed() != nil)
        #expect(worker.reports.eventually { if case .disconnected = $0 { true } else { false } })
        #expect(try TestHost(worker.address, .serve(.host(of: DoorTests.wide))).accepted() != nil)
    }

    @MainActor @Test func theMainThreadDoesNotWaitForGoodbyes() async throws {
        let (worker, host) = try stuck()
        let time = BackgroundLog()
        let failures = Locked<[String]>([])
        let control = ServerSwitch(worker.server) { error in failures.withLock { $0.append("\(error)") } }
        control.pause(time)
        // it is back before the goodbye is over: the end of the background time needs this very thread
        #expect(time.log == ["begin"])
        // and the app comes to the front at once: in its turn, on the port that was given back
        control.listen()
        control.listen()
        while time.log.count < 2 { try await Task.sleep(for: .milliseconds(5)) }
        #expect(time.log == ["begin", "end"])
        while !worker.server.isListening { try await Task.sleep(for: .milliseconds(5)) }
        #expect(failures.withLock { $0 }.isEmpty)
        #expect(host.closed() != nil)
    }

    @Test func aPortThatIsTakenIsSaid() async throws {
        let worker = try TestServer()
        let other = try TestServer(listen: "127.0.0.1:0")
        let failures = Locked<[SocketError]>([])
        var configuration = ServerConfiguration(keys: MemoryKeys())
        configuration.listen = other.address
        let control = ServerSwitch(Server(configuration)) { error in failures.withLock { $0.append(error) } }
        control.listen()
        while failures.withLock({ $0.isEmpty }) { try await Task.sleep(for: .milliseconds(5)) }
        #expect(failures.withLock { $0[0].isAddressInUse })
        withExtendedLifetime((worker, other)) {}
    }

    @Test func aHostThatReadsNothingHoldsUpNobodyElse() throws {
        let (worker, host) = try stuck()
        // the accept thread and the one that changes the stage go on
        for instance in 20..<23 {
            let other = try TestHost(worker.address, .serve(.host(of: DoorTests.wide, instance: UInt64(instance))))
            guard case .busy = other.closed() else {
                Issue.record("not answered: \(String(describing: other.ending))")
                return
            }
        }
        let server = worker.server
        #expect(returns { server.serve(.none) })
        #expect(returns { server.drop(ErrorReport(code: .noMemory, text: "short of memory")) })
        withExtendedLifetime(host) {}
    }

    @Test func silentConnectionsKeepNobodyOut() throws {
        let worker = try TestServer()
        var silent: [Socket] = []
        for round in 0..<20 {
            // more than the sixteen that there is room for, before each try of the owner
            for _ in 0..<20 { silent.append(try Socket.connect(worker.address)) }
            let owner = try TestHost(worker.address, .serve(.host(instance: UInt64(100 + round))))
            #expect(owner.accepted() != nil)
            owner.goodbye()
            // until then the next one would hear BUSY
            for _ in 0..<500 where worker.reports.goodbyes <= round { usleep(10_000) }
            #expect(worker.reports.goodbyes == round + 1)
            silent.removeAll()
        }
    }

    @Test func aCrowdPushesOutItsOwnAndNotAHandshakeFromElsewhere() throws {
        let worker = try TestServer()
        // on another address than the crowd's, and it has not said who it is yet
        let owner = try Socket.connect(worker.address, from: "127.0.0.2")
        usleep(100_000)
        var crowd: [Socket] = []
        for _ in 0..<60 { crowd.append(try Socket.connect(worker.address)) }
        usleep(200_000)
        #expect(!ended(owner))
        #expect(ended(crowd[0]))
        #expect(!ended(crowd[59]))
    }

    /// The owner has two connections under way, and sixty addresses come one after the other without an end.
    @Test func aCrowdOfManyAddressesDrivesOutItsOwn() {
        var crowd = Crowd()
        var here: [String] = []
        for number in 0..<10_000 {
            if here.count >= 16, let place = crowd.leaves(here) { crowd.add(here.remove(at: place)) }
            here.append(number == 1000 || number == 1001 ? "10.0.0.1" : "10.1.0.\(number % 60)")
        }
        #expect(here.filter { $0 == "10.0.0.1" }.count == 2)
    }

    /// 200 connections a second from eight addresses, and an owner from a ninth.
    @Test func theOwnerGetsInThroughAFloodAndAReplyGoesOn() throws {
        let worker = try TestServer()
        let host = try TestHost(worker.address, .serve(.host()))
        _ = host.accepted()
        let over = Locked(false)
        let ended = DispatchSemaphore(value: 0)
        let address = worker.address
        Thread.start("test flood") {
            var open: [Socket] = []
            var number = 0
            while !over.withLock({ $0 }) {
                if let socket = try? Socket.connect(address, from: "127.0.0.\(2 + number % 8)") { open.append(socket) }
                if open.count > 64 { open.removeFirst() }
                number += 1
                usleep(5000)
            }
            ended.signal()
        }
        var oracle = FakeOracle()
        for step in 0..<20 {
            // the second host hears that the first is served, which it can only with its key
            let owner = try TestHost(worker.address, .serve(.host(instance: UInt64(100 + step))))
            guard case .busy? = owner.closed() else {
                Issue.record("try \(step): it did not get in")
                break
            }
            let row = rows(1, seed: step)
            try host.step([Span(session: 0, position: UInt32(step), count: 1)], row)
            #expect(host.done().map { Array($0.rows.hidden) } == oracle.evaluate(row))
        }
        over.withLock { $0 = true }
        ended.wait()
    }

    /// Whether the worker has closed its end, behind its greeting.
    private func ended(_ socket: Socket) -> Bool {
        var byte: UInt8 = 0
        for _ in 0...Greeting.bytes {
            switch withUnsafeMutableBytes(of: &byte, { socket.receive(into: $0, waiting: false) }) {
            case .bytes: continue
            case .ended: return true
            case .nothing: return false
            }
        }
        return false
    }

    @Test func strangersDoNotMakeItReadTheKeychain() throws {
        let keys = MemoryKeys()
        let worker = try TestServer(keys: keys)
        for _ in 0..<10 { _ = try TestHost(worker.address, .serve(.host()), key: .random()).closed() }
        #expect(keys.reads == 1)
        // a key that is forgotten opens nothing, whichever way the server hears of it
        keys.removeAll()
        worker.server.keysChanged()
        #expect(try TestHost(worker.address, .serve(.host())).closed().rule == .key)
        #expect(keys.reads == 2)
    }

    @Test func aKeyFileThatIsDeletedOpensNothing() throws {
        let place = FileManager.default.temporaryDirectory.appendingPathComponent("dim-keys-\(UUID().uuidString)")
        defer { try? FileManager.default.removeItem(at: place) }
        let store = KeyDirectory(place)
        let key = PairKey.random()
        try store.add(key, name: "a desk")
        let worker = try TestServer(keyStore: store)
        #expect(try TestHost(worker.address, .serve(.host()), key: key).accepted() != nil)
        usleep(50_000)
        for name in try FileManager.default.contentsOfDirectory(atPath: place.path) {
            try FileManager.default.removeItem(at: place.appendingPathComponent(name))
        }
        #expect(try TestHost(worker.address, .serve(.host()), key: key).closed().rule == .key)
    }

    #if !canImport(ObjectiveC)
        @Test func eachStepLetsGoOfWhatItMadeTemporarily() throws {
            var shape = StageShape.test
            shape.lastBlock = shape.firstBlock
            let package = FakePackage(blocks: 11...11, nEmbd: shape.nEmbd, nCtx: shape.nCtx)
            // Core ML's arrays, Foundation's strings: whatever a call hands out autoreleased
            package.before = { _, _ in AutoreleaseStandIn.add(bytes: 1 << 20) }
            let stage = PackagedStage(
                shape: shape, parameters: .init(headDim: 2, nPrefill: 16, inverseFrequencies: [1]), packages: [package])
            let worker = try TestServer(stage: .ready(stage))
            AutoreleaseStandIn.isOn = true
            defer { AutoreleaseStandIn.isOn = false }
            AutoreleaseStandIn.reset()
            let host = try TestHost(worker.address, .serve(.host(of: shape)))
            _ = host.accepted()
            for step in 0..<40 {
                try host.step([Span(session: 0, position: UInt32(step), count: 1)], rows(1, seed: step))
                #expect(host.done() != nil)
            }
            #expect(AutoreleaseStandIn.most >= 1 << 20)
            #expect(AutoreleaseStandIn.most <= 4 << 20)
        }
    #endif
}

/// What the system is asked for when the app goes to the background.
@MainActor private final class BackgroundLog: BackgroundTime {
    var log: [String] = []
    func begin() { log.append("begin") }
    func end() { log.append("end") }
}
