// Foreground and background. A suspended app has lost every listener and connection, so it leaves in time, away from the
// main thread, and comes back with a new listener.
import DIMCrypto
import DIMServer
import DIMWire
import Dispatch

/// Where an app is, as the system says it.
public enum AppPhase: Sendable {
    case active
    case inactive
    case background
}

/// What the app has to do when its phase is told, a first time or again. The first phase that an app hears of is a phase
/// like any other: it may be `active` already, and no change to it follows.
public struct Lifecycle: Sendable {
    public enum Action: Equatable, Sendable {
        case resume
        case pause
    }

    private var isInForeground: Bool?

    public init() {}

    public mutating func enter(_ phase: AppPhase) -> Action? {
        switch phase {
        case .active where isInForeground != true:
            isInForeground = true
            return .resume
        case .background where isInForeground == true:
            isInForeground = false
            return .pause
        case .background:
            isInForeground = false
            return nil
        default: return nil
        }
    }
}

/// The time that the system gives to an app that goes to the background: asked for and given back.
public protocol BackgroundTime: Sendable {
    @MainActor func begin()
    @MainActor func end()
}

/// Starts and stops the server in the order in which it was told to, on a thread of its own: goodbyes take as long as
/// hosts that read nothing let them, and the system ends an app whose main thread waits.
public final class ServerSwitch: Sendable {
    private let server: Server
    private let queue = DispatchQueue(label: "dim.server", qos: .userInitiated)
    private let failed: @Sendable (SocketError) -> Void

    /// - Parameter failed: the server cannot listen
    public init(_ server: Server, failed: @escaping @Sendable (SocketError) -> Void) {
        self.server = server
        self.failed = failed
    }

    /// Listens, unless it does already.
    public func listen() {
        queue.async { [server, failed] in
            guard !server.isListening else { return }
            do throws(SocketError) {
                try server.start()
            } catch {
                failed(error)
            }
        }
    }

    /// Says goodbye to whoever is there and gives the port back; the background time lasts until that is done.
    @MainActor
    public func pause(_ time: any BackgroundTime) {
        time.begin()
        queue.async { [server] in
            server.stop(.pausing)
            Task { @MainActor in time.end() }
        }
    }
}
