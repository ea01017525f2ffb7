// What only this system has: where files lie, time in the background, changes of the network.
import DIMPhone
import Foundation
import Network
import UIKit

enum Places {
    /// Pushed packages.
    static var received: URL {
        FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
            .appendingPathComponent("slices")
    }

    /// Copied ones: Finder, Files.
    static var documents: URL { FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0] }
}

/// The seconds that the system gives to an app that goes to the background.
final class UIKitBackgroundTime: BackgroundTime {
    @MainActor private var task = UIBackgroundTaskIdentifier.invalid

    @MainActor
    func begin() {
        end()
        task = UIApplication.shared.beginBackgroundTask(withName: "goodbye") { [weak self] in
            // called on the main thread, when the time is over
            MainActor.assumeIsolated { self?.end() }
        }
    }

    @MainActor
    func end() {
        guard task != .invalid else { return }
        UIApplication.shared.endBackgroundTask(task)
        task = .invalid
    }
}

/// Tells when the network is another one: Wi-Fi, cable, hotspot.
@MainActor
final class NetworkWatch {
    private var monitor: NWPathMonitor?

    /// Calls `changed` with how it is now, and at every change until `stop`.
    func start(_ changed: @escaping @MainActor () -> Void) {
        stop()
        // a monitor that was cancelled does not start again
        let monitor = NWPathMonitor()
        monitor.pathUpdateHandler = { _ in Task { @MainActor in changed() } }
        monitor.start(queue: .global(qos: .utility))
        self.monitor = monitor
    }

    func stop() {
        monitor?.cancel()
        monitor = nil
    }
}
