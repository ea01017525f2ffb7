// Where hosts reach this device, read anew whenever the network changes, and what is announced of it.
import DIMCrypto
import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// One IPv4 address of one interface.
public struct InterfaceAddress: Equatable, Sendable {
    public var interface: String
    public var address: String
    public var isUp: Bool

    public init(interface: String, address: String, isUp: Bool = true) {
        self.interface = interface
        self.address = address
        self.isUp = isUp
    }

    /// Those of this device, as of now.
    public static func all() -> [InterfaceAddress] {
        var list: UnsafeMutablePointer<ifaddrs>?
        guard getifaddrs(&list) == 0 else { return [] }
        defer { freeifaddrs(list) }
        var found: [InterfaceAddress] = []
        var next = list
        while let entry = next {
            defer { next = entry.pointee.ifa_next }
            guard let address = entry.pointee.ifa_addr, Int32(address.pointee.sa_family) == AF_INET else { continue }
            var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
            let size = socklen_t(MemoryLayout<sockaddr_in>.size)
            guard getnameinfo(address, size, &host, socklen_t(host.count), nil, 0, NI_NUMERICHOST) == 0 else {
                continue
            }
            found.append(
                InterfaceAddress(
                    interface: String(cString: entry.pointee.ifa_name),
                    address: String(decoding: host.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self),
                    isUp: UInt32(entry.pointee.ifa_flags) & UInt32(upAndRunning) == UInt32(upAndRunning)))
        }
        return found
    }
}

/// Addresses that a host on the same network can reach: Wi-Fi and cables (`en*`), and the network that this device makes
/// for others as a hotspot (`bridge*`). Not the cellular network, tunnels and links between Apple devices. Addresses that
/// nobody gave out come last.
public func reachable(_ all: [InterfaceAddress]) -> [String] {
    let found = all.filter { entry in
        entry.isUp && (entry.interface.hasPrefix("en") || entry.interface.hasPrefix("bridge"))
    }
    let addresses = found.map(\.address)
    return addresses.filter { !$0.hasPrefix("169.254.") } + addresses.filter { $0.hasPrefix("169.254.") }
}

/// What the local network is told of this worker.
public struct Announcement: Equatable, Sendable {
    public var name: String
    public var port: UInt16
    /// not told, but another set of them is another network, and there it has to be told anew
    public var addresses: [String]

    public init(name: String, port: UInt16, addresses: [String]) {
        self.name = name
        self.port = port
        self.addresses = addresses
    }
}

/// Registers when there is something new to register, and only then.
@MainActor
public final class Announcer {
    private let start: (Announcement) -> Void
    private let stop: () -> Void
    private var current: Announcement?

    public init(start: @escaping (Announcement) -> Void, stop: @escaping () -> Void) {
        self.start = start
        self.stop = stop
    }

    /// nil: nothing is listening.
    public func announce(_ announcement: Announcement?) {
        guard announcement != current else { return }
        if current != nil { stop() }
        current = announcement
        if let announcement { start(announcement) }
    }
}

// IFF_UP and IFF_RUNNING: the same numbers everywhere, an enumeration in some headers
private let upAndRunning = 0x41
