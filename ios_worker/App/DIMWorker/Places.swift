// Where packages come from: pushed ones lie in Application Support, copied ones (Finder, Files) in Documents.
import DIMServer
import DIMStage
import Darwin
import Foundation

enum Places {
    static var received: URL {
        FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
            .appendingPathComponent("slices")
    }

    /// The newest directory that has a manifest.
    static func newest(_ store: PushStore) -> URL? {
        let documents = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0]
        let copied =
            (try? FileManager.default.contentsOfDirectory(
                at: documents, includingPropertiesForKeys: [.contentModificationDateKey])) ?? []
        let all = store.complete() + copied
        return all.filter {
            FileManager.default.fileExists(atPath: $0.appendingPathComponent(Manifest.fileName).path)
        }.max { date($0) < date($1) }
    }

    private static func date(_ url: URL) -> Date {
        (try? url.resourceValues(forKeys: [.contentModificationDateKey]))?.contentModificationDate ?? .distantPast
    }
}

/// IPv4 addresses of this device on Wi-Fi and on cable adapters.
func localAddresses() -> [String] {
    var list: UnsafeMutablePointer<ifaddrs>?
    guard getifaddrs(&list) == 0 else { return [] }
    defer { freeifaddrs(list) }
    var found: [String] = []
    var next = list
    while let entry = next {
        defer { next = entry.pointee.ifa_next }
        guard let address = entry.pointee.ifa_addr, Int32(address.pointee.sa_family) == AF_INET,
            String(cString: entry.pointee.ifa_name).hasPrefix("en")
        else { continue }
        var host = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        let size = socklen_t(MemoryLayout<sockaddr_in>.size)
        guard getnameinfo(address, size, &host, socklen_t(host.count), nil, 0, NI_NUMERICHOST) == 0 else { continue }
        found.append(String(decoding: host.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self))
    }
    return found
}
