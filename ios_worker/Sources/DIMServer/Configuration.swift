// What a server is told by the program around it, and what it tells back.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation

/// How the device is at this moment.
public struct DeviceState: Equatable, Sendable {
    public var temperature = Heartbeat.Temperature.unknown
    /// per cent
    public var battery: UInt8?
    /// what the process may still take: bytes
    public var memory: UInt64?
    /// what it may take in all: bytes; for the screen
    public var memoryLimit: UInt64?

    public init() {}
}

/// What a store holds at a moment.
public struct KeyList: Equatable, Sendable {
    public var keys: [PairKey]
    /// that are there too, and could not be read just now
    public var unread: Set<KeyID>

    public init(_ keys: [PairKey], unread: Set<KeyID> = []) {
        self.keys = keys
        self.unread = unread
    }

    /// Whether the key was taken away, or was never there.
    func lacks(_ id: KeyID) -> Bool { !unread.contains(id) && !keys.contains { $0.id == id } }
}

/// Keys of paired hosts, wherever a system keeps secrets.
public protocol KeyStore: Sendable {
    /// Throws where it is not known which keys there are. A store that is not there yet has none.
    func list() throws -> KeyList
    /// Another number after keys have come or gone in some other way than by `add`: the server keeps what it has read
    /// until then.
    var stamp: UInt64 { get }
    /// Keeps `key` for the host called `name`.
    func add(_ key: PairKey, name: String) throws
}

extension KeyStore {
    /// of a store that only `add` changes, and whoever then calls `Server.keysChanged`
    public var stamp: UInt64 { 0 }

    /// what can be read now
    public func keys() -> [PairKey] { (try? list())?.keys ?? [] }
}

public struct ServerConfiguration: Sendable {
    /// "ADDR:PORT"; port 0: any
    public var listen = "0.0.0.0:7878"
    /// of this device, for people
    public var name = "worker"
    public var software = "dim-worker-swift 0.1.0"
    public var maxInFlight: UInt32 = 4
    /// where pushed packages go; nil = none are taken
    public var pushStore: PushStore?
    public var keys: any KeyStore
    public var device: @Sendable () -> DeviceState = { DeviceState() }
    /// Called from the server's threads.
    public var report: @Sendable (ServerEvent) -> Void = { _ in }

    /// of the listener; tests give others
    var calls = ListenerCalls()

    public init(keys: any KeyStore) { self.keys = keys }
}

/// What a person may want to know.
public enum ServerEvent: Sendable, Equatable {
    case listening(String)
    /// the listener is gone, and not because it was told to stop
    case listenerLost
    case connected(host: String, address: String, connection: String)
    /// with the bytes that were received and sent on that connection, handshake included
    case disconnected(host: String, why: String, received: UInt64, sent: UInt64)
    /// somebody was turned away
    case refused(address: String, why: String)
    /// rows evaluated in one step, and how long it took
    case step(rows: Int, microseconds: UInt64)
    case paired(host: String)
    /// the pairing window closed: expired, or used
    case pairingClosed
    case pushing(bytes: UInt64, of: UInt64)
    /// a push is complete and verified, at this place
    case pushed(URL)
}

/// What the server has to serve.
public enum StageState: Sendable {
    case none
    /// it is being loaded or tested; the text says what
    case loading(StageShape, String)
    case ready(any Stage)
    /// it must not be used; the text says why
    case failed(StageShape, String)

    var shape: StageShape? {
        switch self {
        case .none: nil
        case .loading(let shape, _), .failed(let shape, _): shape
        case .ready(let stage): stage.shape
        }
    }
}

/// A key that a file holds: one line of 64 hexadecimal digits.
public struct KeyFile: KeyStore {
    private let key: PairKey

    public init?(contentsOf path: String) {
        guard let text = try? String(contentsOfFile: path, encoding: .utf8), let key = PairKey(line: text) else {
            return nil
        }
        self.key = key
    }

    public func list() -> KeyList { KeyList([key]) }

    public func add(_ key: PairKey, name: String) throws {
        throw KeyStoreError("this worker was started with --key-file: it does not pair")
    }
}

/// Keys in a directory, one file each, readable by their owner only.
public struct KeyDirectory: KeyStore {
    private let directory: URL

    public init(_ directory: URL) { self.directory = directory }

    /// when the directory was last changed: a key that is deleted there opens nothing from then on
    public var stamp: UInt64 {
        var status = stat()
        guard stat(directory.path, &status) == 0 else { return 1 }
        #if canImport(Darwin)
            let time = status.st_mtimespec
        #else
            let time = status.st_mtim
        #endif
        return UInt64(time.tv_sec) << 30 | UInt64(time.tv_nsec)
    }

    public func list() throws -> KeyList {
        guard isThere(directory) else { return KeyList([]) }
        var list = KeyList([])
        for name in try FileManager.default.contentsOfDirectory(atPath: directory.path).sorted() {
            guard name.hasSuffix(".key") else { continue }
            let file = directory.appendingPathComponent(name)
            if let bytes = try? Data(contentsOf: file) {
                let line = String(decoding: bytes, as: UTF8.self).prefix { $0 != "\n" }
                if let key = PairKey(line: String(line)) { list.keys.append(key) }
            } else if isThere(file), let id = unhex(String(name.dropLast(4))).flatMap({ KeyID($0) }) {
                list.unread.insert(id)
            }
        }
        return list
    }

    /// `false` only where the system says so
    private func isThere(_ place: URL) -> Bool {
        var status = stat()
        return stat(place.path, &status) == 0 || errno != ENOENT
    }

    public func add(_ key: PairKey, name: String) throws {
        try FileManager.default.createDirectory(
            at: directory, withIntermediateDirectories: true, attributes: [.posixPermissions: 0o700])
        // the file is named by the key's id: the host's name is only written into it
        let file = directory.appendingPathComponent(hex(key.id.bytes) + ".key")
        let content = Data("\(key.line)\n# \(shown(name))\n".utf8)
        guard
            FileManager.default.createFile(
                atPath: file.path, contents: content, attributes: [.posixPermissions: 0o600])
        else { throw KeyStoreError("\(file.path) cannot be written") }
    }
}

public struct KeyStoreError: Error, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}
