// The one screen.
import DIMCoreML
import DIMWire
import SwiftUI

struct WorkerView: View {
    let worker: Worker

    var body: some View {
        NavigationStack {
            List {
                if let problem = worker.problem {
                    Section {
                        Label(problem, systemImage: "exclamationmark.triangle")
                            .foregroundStyle(.orange)
                    }
                }
                Section("This worker") {
                    LabeledContent("Name", value: worker.name)
                    ForEach(worker.addresses, id: \.self) { address in
                        LabeledContent("Address", value: address)
                            .textSelection(.enabled)
                    }
                }
                Section("Model") {
                    LabeledContent("Slice", value: worker.slice ?? "none")
                    ForEach(worker.packages) { package in
                        LabeledContent(package.blocks) {
                            Label(package.state, systemImage: package.isReady ? "checkmark.circle" : "hourglass")
                        }
                    }
                    ForEach(worker.figures, id: \.unit) { figure in
                        LabeledContent(figure.unit.uppercased(), value: describe(figure))
                    }
                    if let receiving = worker.receiving {
                        ProgressView("Receiving packages", value: receiving)
                    }
                }
                Section("Host") {
                    LabeledContent("Connected", value: worker.host ?? "nobody")
                    LabeledContent("Tokens", value: "\(worker.steps.tokens)")
                    LabeledContent("Speed", value: String(format: "%.1f tok/s", worker.steps.tokensPerSecond))
                    LabeledContent(
                        "Compute", value: String(format: "%.1f ms per step", worker.steps.millisecondsPerStep))
                }
                Section("Device") {
                    LabeledContent("Memory left", value: worker.device.memory.map { "\($0 >> 20) MiB" } ?? "unknown")
                    LabeledContent("Temperature", value: describe(worker.device.temperature))
                    LabeledContent("Battery", value: worker.device.battery.map { "\($0) %" } ?? "unknown")
                }
                Section {
                    if let pairing = worker.pairing {
                        PairingView(offer: pairing) { worker.hidePairingCode() }
                    } else {
                        Button("Pair with a host") { worker.showPairingCode() }
                    }
                } footer: {
                    Text("Keep this screen open: iOS stops the worker when the app leaves the foreground.")
                }
            }
            .navigationTitle("DIM")
        }
    }

    private func describe(_ figure: UnitFigure) -> String {
        guard figure.passes else { return figure.problem ?? "failed" }
        return String(format: "%.1f ms per token, error %.2g", figure.decodeMs ?? 0, figure.medianError ?? 0)
    }

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
