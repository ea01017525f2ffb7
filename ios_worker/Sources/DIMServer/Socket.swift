// The one file that calls the socket interface, for Linux and Darwin alike (Network.framework would do on Apple systems
// only, and then nothing of the server could be run on Linux). Blocking sockets, absolute times in milliseconds.
import DIMCrypto
import DIMWire
import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// A clock that only goes forward.
public func monotonicMilliseconds() -> Milliseconds { Milliseconds(monotonicMicroseconds() / 1000) }

func monotonicMicroseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000 + UInt64(time.tv_nsec) / 1000
}

/// A call of the system failed: which, and with what.
public struct SocketError: Error, Equatable, CustomStringConvertible {
    public let call: String
    public let code: Int32

    init(_ call: String) {
        self.call = call
        code = errno
    }

    init(_ call: String, code: Int32) {
        self.call = call
        self.code = code
    }

    public var description: String { "\(call): \(String(cString: strerror(code)))" }
    public var isAddressInUse: Bool { code == EADDRINUSE }
}

/// Owns a file descriptor. A class on purpose: noncopyable owners crash Swift 6.0's optimiser across modules.
final class Socket: @unchecked Sendable {
    enum Received: Equatable {
        case bytes(Int)
        /// the peer closed, or the connection broke
        case ended
        /// nothing came in time
        case nothing
    }

    let descriptor: Int32

    init(_ descriptor: Int32) { self.descriptor = descriptor }

    deinit { close(descriptor) }

    /// A listening socket at `address`, "ADDR:PORT" or "[ADDR]:PORT".
    static func listen(_ address: String) throws(SocketError) -> Socket {
        guard let (host, port) = split(address) else { throw SocketError("\(address) is no ADDR:PORT", code: EINVAL) }
        var hints = addrinfo()
        hints.ai_flags = AI_PASSIVE | AI_NUMERICHOST | AI_NUMERICSERV
        hints.ai_socktype = streamType
        var found: UnsafeMutablePointer<addrinfo>?
        guard getaddrinfo(host, port, &hints, &found) == 0, let info = found else {
            throw SocketError("\(address) is no ADDR:PORT", code: EINVAL)
        }
        defer { freeaddrinfo(found) }
        let descriptor = socket(info.pointee.ai_family, info.pointee.ai_socktype, info.pointee.ai_protocol)
        guard descriptor >= 0 else { throw SocketError("socket") }
        let listener = Socket(descriptor)
        listener.set(SOL_SOCKET, SO_REUSEADDR, 1)
        if info.pointee.ai_family == AF_INET6 { listener.set(Int32(IPPROTO_IPV6), IPV6_V6ONLY, 0) }
        guard bind(descriptor, info.pointee.ai_addr, info.pointee.ai_addrlen) == 0 else {
            throw SocketError("bind \(address)")
        }
        #if canImport(Darwin)
            let listening = Darwin.listen(descriptor, backlog)
        #else
            let listening = Glibc.listen(descriptor, backlog)
        #endif
        guard listening == 0 else { throw SocketError("listen \(address)") }
        return listener
    }

    /// A connection to `address`, from `source` if that matters: for tests.
    static func connect(_ address: String, from source: String? = nil) throws(SocketError) -> Socket {
        guard let (host, port) = split(address) else { throw SocketError("\(address) is no ADDR:PORT", code: EINVAL) }
        var hints = addrinfo()
        hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV
        hints.ai_socktype = streamType
        var found: UnsafeMutablePointer<addrinfo>?
        guard getaddrinfo(host, port, &hints, &found) == 0, let info = found else {
            throw SocketError("\(address) is no ADDR:PORT", code: EINVAL)
        }
        defer { freeaddrinfo(found) }
        let descriptor = socket(info.pointee.ai_family, info.pointee.ai_socktype, info.pointee.ai_protocol)
        guard descriptor >= 0 else { throw SocketError("socket") }
        let connection = Socket(descriptor)
        if let source {
            var from = sockaddr_in()
            from.sin_family = sa_family_t(AF_INET)
            inet_pton(AF_INET, source, &from.sin_addr)
            let bound = withUnsafePointer(to: &from) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    bind(descriptor, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
                }
            }
            guard bound == 0 else { throw SocketError("bind \(source)") }
        }
        #if canImport(Darwin)
            let connected = Darwin.connect(descriptor, info.pointee.ai_addr, info.pointee.ai_addrlen)
        #else
            let connected = Glibc.connect(descriptor, info.pointee.ai_addr, info.pointee.ai_addrlen)
        #endif
        guard connected == 0 else { throw SocketError("connect \(address)") }
        connection.configure()
        return connection
    }

    /// The options of PROTOCOL.md section 12.
    func configure() {
        set(Int32(IPPROTO_TCP), TCP_NODELAY, 1)
        set(SOL_SOCKET, SO_KEEPALIVE, 1)
        #if canImport(Darwin)
            set(SOL_SOCKET, SO_NOSIGPIPE, 1)
            set(Int32(IPPROTO_TCP), TCP_KEEPALIVE, 1)
            set(Int32(IPPROTO_TCP), TCP_RXT_CONNDROPTIME, 3)
        #else
            set(Int32(IPPROTO_TCP), TCP_KEEPIDLE, 1)
            set(Int32(IPPROTO_TCP), TCP_USER_TIMEOUT, Int32(Socket.stalled))
        #endif
        set(Int32(IPPROTO_TCP), TCP_KEEPINTVL, 1)
        set(Int32(IPPROTO_TCP), TCP_KEEPCNT, 3)
        setTimeout(SO_RCVTIMEO, Socket.patience)
    }

    /// Connections that wait in the system's queue while a crowd keeps the accept thread busy: one that finds no room
    /// there is tried again after a second.
    private static let backlog: Int32 = 1024

    /// Whether `accept` and `recv` wait.
    func setBlocking(_ blocks: Bool) {
        let flags = fcntl(descriptor, F_GETFL)
        _ = fcntl(descriptor, F_SETFL, blocks ? flags & ~O_NONBLOCK : flags | O_NONBLOCK)
    }

    /// How long a peer may take nothing. Not less: one that computes with its buffers full takes no bytes for as long,
    /// and is heard all the same.
    static let stalled: Milliseconds = 30_000
    /// How long one blocking receive waits before the caller looks at its clock again.
    static let patience: Milliseconds = 100

    private func set(_ level: Int32, _ option: Int32, _ value: Int32) {
        var value = value
        setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    private func setTimeout(_ option: Int32, _ time: Milliseconds) {
        var value = timeval()
        value.tv_sec = .init(time / 1000)
        value.tv_usec = .init(time % 1000 * 1000)
        setsockopt(descriptor, SOL_SOCKET, option, &value, socklen_t(MemoryLayout<timeval>.size))
    }

    /// Receives what is there, waiting up to `patience` (or not at all) for the first byte.
    func receive(into buffer: UnsafeMutableRawBufferPointer, waiting: Bool) -> Received {
        while true {
            let count = recv(descriptor, buffer.baseAddress, buffer.count, waiting ? 0 : Int32(MSG_DONTWAIT.rawInt))
            if count > 0 { return .bytes(count) }
            if count == 0 { return .ended }
            switch errno {
            case EINTR: continue
            case EAGAIN, EWOULDBLOCK: return .nothing
            default: return .ended
            }
        }
    }

    /// Whether something can be received, waiting up to `time` for it.
    func waitReadable(_ time: Milliseconds) -> Bool {
        var waiting = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        return poll(&waiting, 1, Int32(clamping: max(0, time))) > 0
    }

    /// Sends everything; false if the connection broke, the peer takes nothing for `stalled`, or `endSends` has said
    /// until when.
    func send(_ bytes: [UInt8]) -> Bool {
        bytes.withUnsafeBytes { whole in
            var sent = 0
            var progress: Milliseconds?
            while sent < whole.count {
                let flags = Int32(MSG_DONTWAIT.rawInt) | noSignal
                #if canImport(Darwin)
                    let count = Darwin.send(descriptor, whole.baseAddress! + sent, whole.count - sent, flags)
                #else
                    let count = Glibc.send(descriptor, whole.baseAddress! + sent, whole.count - sent, flags)
                #endif
                if count > 0 {
                    sent += count
                    progress = nil
                    continue
                }
                switch errno {
                case EINTR: continue
                case EAGAIN, EWOULDBLOCK:
                    let now = monotonicMilliseconds()
                    let since = progress ?? now
                    progress = since
                    let end = min(since + Socket.stalled, lastSend)
                    guard now < end else { return false }
                    _ = waitWritable(min(end - now, Socket.patience))
                default: return false
                }
            }
            return true
        }
    }

    /// Whether something can be sent, waiting up to `time` for it.
    func waitWritable(_ time: Milliseconds) -> Bool {
        var waiting = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
        return poll(&waiting, 1, Int32(clamping: max(0, time))) > 0
    }

    /// Sends that wait, those under way too, give up when `time` has passed from now: whoever leaves does not wait for a
    /// peer that takes nothing.
    func endSends(within time: Milliseconds) {
        let end = monotonicMilliseconds() + time
        sendsEnd.withLock { $0 = min($0, end) }
    }

    private let sendsEnd = Locked(Milliseconds.max)
    private var lastSend: Milliseconds { sendsEnd.withLock { $0 } }

    /// Wakes whoever waits in `receive`, and the peer: nothing more goes either way.
    func shutDown() {
        _ = shutdown(descriptor, shutBoth)
    }

    /// The end of what this side sends; the peer reads it all before it sees the end.
    func finishSending() {
        _ = shutdown(descriptor, shutWrite)
    }

    /// "ADDR:PORT" of this end or of the other.
    func address(ofPeer: Bool) -> String {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        return withUnsafeMutablePointer(to: &storage) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                let got =
                    ofPeer
                    ? getpeername(descriptor, address, &length) : getsockname(descriptor, address, &length)
                guard got == 0 else { return "?" }
                var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
                var port = [CChar](repeating: 0, count: Int(NI_MAXSERV))
                let flags = NI_NUMERICHOST | NI_NUMERICSERV
                guard
                    getnameinfo(
                        address, length, &host, socklen_t(host.count), &port, socklen_t(port.count), flags) == 0
                else { return "?" }
                let (hostText, portText) = (text(host), text(port))
                return hostText.contains(":") ? "[\(hostText)]:\(portText)" : "\(hostText):\(portText)"
            }
        }
    }

    /// What an address is counted as: an IPv4 address is itself, of an IPv6 address its first 64 bits.
    static func network(of host: String) -> String {
        var address = in6_addr()
        let number = host.prefix { $0 != "%" }
        guard inet_pton(AF_INET6, String(number), &address) == 1 else { return host }
        let bytes = withUnsafeBytes(of: &address) { Array($0) }
        if bytes[..<12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF] {
            return bytes[12...].map { String($0) }.joined(separator: ".")
        }
        return hex(bytes[..<8])
    }

    /// Host and port of "ADDR:PORT" or "[ADDR]:PORT".
    static func split(_ address: String) -> (host: String, port: String)? {
        guard let colon = address.lastIndex(of: ":") else { return nil }
        var host = String(address[..<colon])
        let port = String(address[address.index(after: colon)...])
        if host.hasPrefix("["), host.hasSuffix("]") { host = String(host.dropFirst().dropLast()) }
        guard !host.isEmpty, UInt16(port) != nil else { return nil }
        return (host, port)
    }
}

private func text(_ characters: [CChar]) -> String {
    String(decoding: characters.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
}

// The same numbers on every system, but an enum in one's headers and an integer in another's.
private let streamType: Int32 = 1  // SOCK_STREAM
#if canImport(Darwin)
    private let noSignal: Int32 = 0  // SO_NOSIGPIPE
#else
    private let noSignal = Int32(MSG_NOSIGNAL.rawInt)
#endif
private let shutWrite: Int32 = 1  // SHUT_WR
private let shutBoth: Int32 = 2  // SHUT_RDWR

// Glibc imports some constants as Int where Darwin has Int32.
extension BinaryInteger {
    fileprivate var rawInt: Int { Int(self) }
}
