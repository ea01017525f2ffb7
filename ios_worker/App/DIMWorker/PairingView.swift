// A pairing code to be read out, and the same with the address as a QR code.
import CoreImage
import SwiftUI
import UIKit

struct PairingView: View {
    let offer: Worker.PairingOffer
    let close: @MainActor () -> Void

    var body: some View {
        VStack(spacing: 12) {
            Text("On the host: dim-host pair ADDRESS")
                .font(.footnote)
            Text(offer.code)
                .font(.system(.title3, design: .monospaced))
                .textSelection(.enabled)
            if let image = qrCode(offer.link) {
                Image(uiImage: image)
                    .interpolation(.none)
                    .resizable()
                    .scaledToFit()
                    .frame(width: 180, height: 180)
                    .accessibilityLabel("Pairing code as a QR code")
            }
            Text(offer.until, style: .timer)
                .font(.footnote)
            Button("Close", action: close)
        }
        .frame(maxWidth: .infinity)
    }

    private func qrCode(_ text: String) -> UIImage? {
        guard let filter = CIFilter(name: "CIQRCodeGenerator") else { return nil }
        filter.setValue(Data(text.utf8), forKey: "inputMessage")
        filter.setValue("M", forKey: "inputCorrectionLevel")
        guard let output = filter.outputImage,
            let image = CIContext().createCGImage(output, from: output.extent)
        else { return nil }
        return UIImage(cgImage: image)
    }
}
