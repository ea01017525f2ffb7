// The phone as a worker: one screen that says what is going on. All that works is in the package beside this folder.
import SwiftUI

@main
struct DIMWorkerApp: App {
    @State private var worker = Worker()
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            WorkerView(worker: worker)
                .task { await worker.load() }
        }
        .onChange(of: phase) { _, phase in
            // the system takes every listener and connection from a suspended app: leave in time, come back anew
            switch phase {
            case .active: worker.resume()
            case .background: worker.pause()
            default: break
            }
        }
    }
}
