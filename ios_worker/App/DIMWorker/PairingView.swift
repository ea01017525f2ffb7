// What to run on the host, whole, to be read or copied.
import DIMPhone
import SwiftUI
import UIKit

struct PairingView: View {
    let pairing: Screen.Pairing
    let address: String?
    let close: @MainActor () -> Void

    var body: some View {
        VStack(spacing: 12) {
            if let command = pairing.command(address) {
                Text("On the host:")
                    .font(.footnote)
                Text(command)
                    .font(.system(.body, design: .monospaced))
                    .textSelection(.enabled)
                Button("Copy") { UIPasteboard.general.string = command }
            } else {
                Text("This device is in no network that a host could reach. The code is:")
                    .font(.footnote)
                Text(pairing.code)
                    .font(.system(.title3, design: .monospaced))
                    .textSelection(.enabled)
            }
            Text(pairing.until, style: .timer)
                .font(.footnote)
            Button("Close", action: close)
        }
        .frame(maxWidth: .infinity)
    }
}
