// The one screen. Each section is a view of its own that reads only what it shows: what changes twice a second redraws two
// sections, not the list.
import DIMCoreML
import DIMPhone
import DIMServer
import DIMWire
import SwiftUI

struct WorkerView: View {
    let worker: Worker

    var body: some View {
        NavigationStack {
            List {
                ProblemSection(worker: worker)
                NameSection(worker: worker)
                ModelSection(worker: worker)
                HostSection(screen: worker.screen)
                DeviceSection(screen: worker.screen)
                PairingSection(worker: worker)
                StorageSection(worker: worker)
            }
            .navigationTitle("DIM")
        }
    }
}

private struct ProblemSection: View {
    let worker: Worker

    var body: some View {
        if let problem = worker.screen.problem {
            Section {
                Label(problem.text, systemImage: "exclamationmark.triangle")
                if problem.canRetry { Button("Try again") { worker.tryAgain() } }
            }
        }
    }
}

private struct NameSection: View {
    let worker: Worker
    @State private var typed = ""

    var body: some View {
        Section("This worker") {
            LabeledContent("Name", value: worker.screen.name)
            TextField("Another name", text: $typed)
                .onSubmit { worker.rename(typed) }
            ForEach(worker.screen.addresses, id: \.self) { address in
                LabeledContent("Address", value: address)
                    .textSelection(.enabled)
            }
        }
    }
}

private struct ModelSection: View {
    let worker: Worker

    var body: some View {
        Section("Model") {
            LabeledContent("Slice", value: worker.screen.slice ?? "none")
            ForEach(worker.screen.packages) { package in
                LabeledContent(package.blocks) {
                    Label(package.state, systemImage: package.isReady ? "checkmark.circle" : "hourglass")
                }
            }
            ForEach(worker.screen.figures, id: \.unit) { figure in
                LabeledContent(figure.unit.uppercased(), value: figure.sentence)
            }
            if let receiving = worker.screen.receiving {
                ProgressView("Receiving packages", value: receiving)
            }
            if worker.screen.packages.contains(where: \.isReady) {
                Button("Compare units") { worker.compareUnits() }
            }
        }
    }
}

private struct HostSection: View {
    let screen: Screen

    var body: some View {
        Section("Host") {
            LabeledContent("Connected", value: screen.host ?? "nobody")
            StepRows(steps: screen.steps)
        }
    }
}

/// Drawn when a figure is another one.
private struct StepRows: View, Equatable {
    let steps: StepMeter.Reading

    var body: some View {
        LabeledContent("Rows", value: "\(steps.rows)")
        LabeledContent("Speed", value: String(format: "%.1f rows/s", steps.rowsPerSecond))
        LabeledContent("Compute", value: String(format: "%.1f ms per step", steps.millisecondsPerStep))
    }
}

private struct DeviceSection: View {
    let screen: Screen

    var body: some View {
        Section("Device") {
            LabeledContent("Memory left", value: size(screen.device.memory))
            LabeledContent("Memory in all", value: size(screen.device.memoryLimit))
            LabeledContent("Temperature", value: describe(screen.device.temperature))
            LabeledContent("Battery", value: screen.device.battery.map { "\($0) %" } ?? "unknown")
        }
    }

    private func size(_ bytes: UInt64?) -> String { bytes.map { "\($0 >> 20) MiB" } ?? "no limit" }

    private func describe(_ temperature: Heartbeat.Temperature) -> String {
        switch temperature {
        case .unknown: "unknown"
        case .nominal: "normal"
        case .fair: "warm"
        case .serious: "hot: slower"
        case .critical: "too hot: stopped"
        }
    }
}

private struct PairingSection: View {
    let worker: Worker

    var body: some View {
        Section {
            if let pairing = worker.screen.pairing {
                PairingView(pairing: pairing, address: worker.screen.addresses.first) { worker.hidePairingCode() }
            } else {
                if let host = worker.screen.paired {
                    Label("Paired with \(host)", systemImage: "checkmark.circle")
                }
                Button("Pair with a host") { worker.showPairingCode() }
            }
        } footer: {
            Text("Keep this screen open: iOS stops the worker when the app leaves the foreground.")
        }
    }
}

private struct StorageSection: View {
    let worker: Worker

    var body: some View {
        if !worker.screen.stored.isEmpty {
            Section("Storage") {
                ForEach(worker.screen.stored, id: \.url) { slice in
                    LabeledContent(slice.url.lastPathComponent) {
                        Text(String(format: "%.2f GB", Double(slice.bytes) / 1e9))
                        Text(slice.date, style: .date)
                        Button("Delete", role: .destructive) { worker.delete(slice) }
                    }
                }
            }
        }
    }
}
