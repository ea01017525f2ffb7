// A listener that can be stopped on every system.
//
// On Linux `shutdown` wakes a thread that waits in `accept`; on Darwin it fails with ENOTCONN and wakes nobody, so the
// thread would keep the descriptor, and the port, for ever. And a listener that iOS took from a suspended app fails every
// `accept` from then on with ECONNABORTED, the very error of one client that went away. So: the descriptor does not
// block, the thread waits in `poll` for it and for a pipe, and `stop` writes to the pipe and waits for the thread.
import DIMCrypto
import DIMWire
import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// What a listener asks of the system; tests put in its place what behaves as Darwin does.
struct ListenerCalls: Sendable {
    /// A descriptor, or -1 and `errno`.
    var accept: @Sendable (_ listener: Int32) -> (descriptor: Int32, code: Int32) = { listener in
        #if canImport(Darwin)
            let accepted = Darwin.accept(listener, nil, nil)
        #else
            let accepted = Glibc.accept(listener, nil, nil)
        #endif
        return (accepted, accepted < 0 ? errno : 0)
    }
    /// What `stop` does to the listening descriptor to wake a thread that waits on it. Nothing: no call does that
    /// everywhere.
    var wake: @Sendable (_ listener: Int32) -> Void = { _ in }
}

/// A listening socket and the loop that accepts from it.
final class Listener: @unchecked Sendable {
    /// "ADDR:PORT", with the real port
    let address: String
    private let calls: ListenerCalls
    /// read end, write end: a byte in it, or its end, wakes the loop
    private let pipe: (Int32, Int32)
    private let condition = NSCondition()

    // Under `condition`.
    private var socket: Socket?
    private var isStopped = false
    private var state = State.made

    private enum State { case made, running, ended }

    /// Listens at `address`, "ADDR:PORT" or "[ADDR]:PORT".
    init(_ address: String, calls: ListenerCalls = ListenerCalls()) throws(SocketError) {
        let socket = try Socket.listen(address)
        socket.setBlocking(false)
        var ends: [Int32] = [-1, -1]
        #if canImport(Darwin)
            let made = Darwin.pipe(&ends)
        #else
            let made = Glibc.pipe(&ends)
        #endif
        guard made == 0 else { throw SocketError("pipe") }
        pipe = (ends[0], ends[1])
        self.socket = socket
        self.calls = calls
        self.address = socket.address(ofPeer: false)
    }

    deinit {
        close(pipe.0)
        close(pipe.1)
    }

    /// Hands each connection to `take` until the listener is stopped or lost, then gives the port back.
    func run(_ take: (Socket) -> Void) {
        condition.lock()
        guard state == .made, let descriptor = socket?.descriptor else {
            condition.unlock()
            return
        }
        state = .running
        condition.unlock()
        var lives = true
        while lives { lives = pooled { turn(descriptor, take) } }
        condition.lock()
        socket = nil
        state = .ended
        condition.broadcast()
        condition.unlock()
    }

    /// Ends the loop and waits for it: the port is free when this returns. Not from within the loop's own `take`.
    func stop() {
        condition.lock()
        defer { condition.unlock() }
        isStopped = true
        guard let socket else { return }
        var byte: UInt8 = 1
        _ = write(pipe.1, &byte, 1)
        calls.wake(socket.descriptor)
        if state == .made {
            self.socket = nil
            state = .ended
        }
        while state != .ended { condition.wait() }
    }

    /// One wait and one accept; false at the end.
    private func turn(_ descriptor: Int32, _ take: (Socket) -> Void) -> Bool {
        var waiting = [
            pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
            pollfd(fd: pipe.0, events: Int16(POLLIN), revents: 0),
        ]
        let ready = poll(&waiting, 2, -1)
        if locked({ isStopped }) { return false }
        guard ready > 0 else { return errno == EINTR }
        let (accepted, code) = calls.accept(descriptor)
        if accepted >= 0 {
            aborted = 0
            let connection = Socket(accepted)
            // Darwin's accepted sockets are as non-blocking as the listener they come from
            connection.setBlocking(true)
            connection.configure()
            take(connection)
            return true
        }
        switch code {
        case EINTR, EAGAIN, EWOULDBLOCK: return true
        case ECONNABORTED:
            // a client that went away before it was accepted, or a listener that the system has taken: the second never
            // gives anything else again
            aborted += 1
            return aborted < Listener.mostAborted
        case EMFILE, ENFILE, ENOBUFS, ENOMEM:
            // out of descriptors for the moment: connections that end give some back; `stop` is not kept waiting
            var stopping = pollfd(fd: pipe.0, events: Int16(POLLIN), revents: 0)
            _ = poll(&stopping, 1, 50)
            return true
        default: return false
        }
    }

    /// ECONNABORTED, one after the other: of the loop only
    private var aborted = 0
    /// as many clients do not vanish in one row without one that stays
    static let mostAborted = 100

    private func locked<R>(_ body: () -> R) -> R {
        condition.lock()
        defer { condition.unlock() }
        return body()
    }
}
