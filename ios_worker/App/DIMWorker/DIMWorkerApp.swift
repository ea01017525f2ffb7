// The phone as a worker: one screen that says what is going on. All that works is in the package beside this folder.
import DIMPhone
import SwiftUI

@main
struct DIMWorkerApp: App {
    @State private var worker = Worker()
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            WorkerView(worker: worker)
        }
        // the first phase too: it may be `active` already, and no change to it follows
        .onChange(of: phase, initial: true) { _, phase in
            // the system takes every listener and connection from a suspended app: leave in time, come back anew
            switch phase {
            case .active: worker.enter(.active)
            case .background: worker.enter(.background)
            default: worker.enter(.inactive)
            }
        }
    }
}
