// The listener where the system behaves as Darwin does: `shutdown` wakes nobody, a listener of a suspended app fails for
// ever, accepted sockets do not block.
import DIMCrypto
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

@Suite(.serialized) struct ListenerTests {
    /// A port that is free now and that nothing but this test takes.
    private func freePort() throws -> String {
        let listener = try Listener("127.0.0.1:0")
        defer { listener.stop() }
        return listener.address
    }

    @Test func onePortIsTakenAndGivenBackTwentyTimes() throws {
        // no call wakes the loop: what stops it must not be a shutdown of the listening socket
        var calls = ListenerCalls()
        calls.wake = { _ in }
        let worker = try TestServer(listen: try freePort(), calls: calls)
        let address = worker.address
        for _ in 0..<20 {
            let host = try TestHost(address, .serve(.host()))
            #expect(host.accepted() != nil)
            worker.server.stop(.pausing)
            #expect(host.closed() == .goodbye(.pausing))
            #expect(throws: SocketError.self) { try Socket.connect(address) }
            // EADDRINUSE if the thread of the last one still had the socket
            try worker.restart()
            #expect(worker.address == address)
        }
    }

    @Test func startingTwiceTakesOverTheSamePort() throws {
        let worker = try TestServer(listen: try freePort())
        try worker.restart()
        #expect(try TestHost(worker.address, .serve(.host())).accepted() != nil)
        #expect(!worker.reports.all.contains(.listenerLost))
    }

    @Test func aListenerThatTheSystemTookIsLostAndNotTriedForEver() throws {
        let tries = Locked(0)
        let taken = Switch()
        var calls = ListenerCalls()
        let system = calls.accept
        calls.accept = { listener in
            guard taken.isOn else { return system(listener) }
            tries.withLock { $0 += 1 }
            return (-1, ECONNABORTED)
        }
        let worker = try TestServer(calls: calls)
        taken.isOn = true
        let stranger = try Socket.connect(worker.address)
        #expect(worker.reports.eventually { $0 == .listenerLost })
        #expect(!worker.server.isListening)
        #expect(tries.withLock { $0 } <= Listener.mostAborted)
        stranger.shutDown()
        // and the app comes back
        taken.isOn = false
        try worker.restart()
        #expect(try TestHost(worker.address, .serve(.host())).accepted() != nil)
    }

    @Test func clientsThatGoAwayBeforeTheyAreAcceptedEndNothing() throws {
        let left = Locked(5)
        var calls = ListenerCalls()
        let system = calls.accept
        calls.accept = { listener in
            let found = system(listener)
            let goes = left.withLock { left in
                defer { left = max(0, left - 1) }
                return left > 0
            }
            guard goes, found.descriptor >= 0 else { return found }
            close(found.descriptor)
            return (-1, ECONNABORTED)
        }
        let worker = try TestServer(calls: calls)
        for _ in 0..<5 { _ = try Socket.connect(worker.address) }
        #expect(try TestHost(worker.address, .serve(.host())).accepted() != nil)
        #expect(worker.server.isListening)
    }

    @Test func acceptedSocketsBlockWhateverTheyInherit() throws {
        var calls = ListenerCalls()
        let system = calls.accept
        calls.accept = { listener in
            let found = system(listener)
            if found.descriptor >= 0 { _ = fcntl(found.descriptor, F_SETFL, O_NONBLOCK) }
            return found
        }
        let listener = try Listener("127.0.0.1:0", calls: calls)
        let accepted = Locked<Socket?>(nil)
        let came = DispatchSemaphore(value: 0)
        Thread.start("accept") {
            listener.run { socket in
                accepted.withLock { $0 = socket }
                came.signal()
            }
        }
        let client = try Socket.connect(listener.address)
        came.wait()
        let socket = try #require(accepted.withLock { $0 })
        #expect(fcntl(socket.descriptor, F_GETFL) & O_NONBLOCK == 0)
        client.shutDown()
        listener.stop()
    }

    @Test func stoppingBeforeTheLoopRunsGivesThePortBack() throws {
        let address = try freePort()
        for _ in 0..<3 {
            let listener = try Listener(address)
            listener.stop()
            listener.stop()
            listener.run { _ in Issue.record("a stopped listener took a connection") }
        }
    }
}
